"""Empty stand-ins for the packages that SGLang imports and that need CUDA, so that it can be imported at
all."""

import importlib.machinery
import os
import sys
import types
from unittest.mock import MagicMock

import transformers.models.auto.processing_auto  # noqa: F401  (before there seems to be a torchvision)


class StandIns:
    """Finds every module of the packages that need CUDA; whatever is asked of them is a mock."""

    def find_spec(self, name, path=None, target=None):
        missing = {
            "torchvision",
            "torchcodec",
            "sgl_kernel",
            "flashinfer",
            "triton_kernels",
            "pynvml",
            "deep_ep",
        }
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True)
            if name.partition(".")[0] in missing
            else None
        )

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = self.attribute
        return module

    def attribute(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()

    def exec_module(self, module):
        pass


os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
sys.meta_path.insert(0, StandIns())
