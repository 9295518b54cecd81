"""The tensor that stands in for a quantized weight: its class, and the operations on it, a module for each
kind."""

from rtn_tensor.tensor import attention, collectives, copies, products, views  # noqa: F401  (they register the operations)
from rtn_tensor.tensor.quantized import RTNQuantizedTensor

__all__ = ["RTNQuantizedTensor"]
