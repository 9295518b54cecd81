"""`python -m rtn_tensor`."""

import sys

from rtn_tensor.cli import main

sys.exit(main())
