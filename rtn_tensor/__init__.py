"""Calibration-free round-to-nearest int4 and int8 weight-only quantization for PyTorch."""

from rtn_tensor import _torchao  # noqa: F401  (first: torchao speaks when it is imported)
from rtn_tensor.checkpoint.export import export
from rtn_tensor.checkpoint.load import load
from rtn_tensor.checkpoint.rank0 import load_from_rank0
from rtn_tensor.checkpoint.save import save
from rtn_tensor.config import RTNConfig, rtn, rtn_int4, rtn_int8
from rtn_tensor.evaluation.comparison import compare
from rtn_tensor.integrations.diffusers import diffusion_blocks_only
from rtn_tensor.integrations.transformers.language_model import language_model_only
from rtn_tensor.integrations.transformers.on_the_fly import fqn_config
from rtn_tensor.kernels.registry import explain
from rtn_tensor.quantize.activations import set_activations_
from rtn_tensor.quantize.allocation import plan
from rtn_tensor.quantize.api import dequantize_, quantize_
from rtn_tensor.quantize.by_layer import select_layers, select_modules
from rtn_tensor.quantize.refine import refine_
from rtn_tensor.quantize.report import report
from rtn_tensor.quantize.selection import bits_per_weight
from rtn_tensor.tensor import RTNQuantizedTensor

__version__ = "0.1.0"

__all__ = [
    "RTNConfig",
    "RTNQuantizedTensor",
    "bits_per_weight",
    "compare",
    "dequantize_",
    "diffusion_blocks_only",
    "explain",
    "export",
    "fqn_config",
    "language_model_only",
    "load",
    "load_from_rank0",
    "plan",
    "quantize_",
    "refine_",
    "report",
    "rtn",
    "rtn_int4",
    "rtn_int8",
    "save",
    "select_layers",
    "select_modules",
    "set_activations_",
]
