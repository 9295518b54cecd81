"""transformers: its folders and models are read, it is told what of a model is quantized, and it runs
quantized experts by our kernels."""

from rtn_tensor.integrations import LISTENERS
from rtn_tensor.integrations.transformers import planes  # noqa: F401  (has torchao's reader make them)
from rtn_tensor.integrations.transformers.description import describe
from rtn_tensor.integrations.transformers.experts import use_experts

LISTENERS += [use_experts, describe]
