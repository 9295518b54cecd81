"""The tensor that stands in for a quantized weight."""

from rtn_tensor.tensor.quantized import RTNQuantizedTensor

__all__ = ["RTNQuantizedTensor"]
