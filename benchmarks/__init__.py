"""One runner a subject; run them as `python -m benchmarks.NAME`."""

import rtn_tensor  # noqa: F401  (before transformers, which would import torchao with all its start-up messages)
