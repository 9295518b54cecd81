"""The command `rtn-tensor`."""

from rtn_tensor.cli.arguments import parser
from rtn_tensor.cli.main import main

__all__ = ["main", "parser"]
