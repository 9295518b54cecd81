"""Which weights of a model are quantized, how, and the quantizing of them."""

from rtn_tensor.quantize.api import dequantize_, quantize_

__all__ = ["dequantize_", "quantize_"]
