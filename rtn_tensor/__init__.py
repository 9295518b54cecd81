"""Calibration-free round-to-nearest int4 and int8 weight-only quantization for PyTorch."""

from rtn_tensor import quiet  # noqa: F401  (first: torchao speaks when it is imported)
from rtn_tensor.checkpoint import fqn_config, load, load_from_rank0, save
from rtn_tensor.config import RTNConfig, rtn, rtn_int4, rtn_int8
from rtn_tensor.kernels.registry import explain
from rtn_tensor.plan import plan
from rtn_tensor.policy import bits_per_weight, select_layers, select_modules
from rtn_tensor.quantize import dequantize_, quantize_, report
from rtn_tensor.sharding import RTNQuantizedTensor  # with its collectives

__all__ = [
    "RTNConfig",
    "RTNQuantizedTensor",
    "bits_per_weight",
    "dequantize_",
    "explain",
    "fqn_config",
    "load",
    "load_from_rank0",
    "plan",
    "quantize_",
    "report",
    "rtn",
    "rtn_int4",
    "rtn_int8",
    "save",
    "select_layers",
    "select_modules",
]
