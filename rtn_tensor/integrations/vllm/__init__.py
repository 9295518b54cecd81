# pyright: reportMissingImports=false
"""vLLM's `--quantization rtn`: weights quantized while they load, or as a quantized folder has them, and run
by this library's kernels.

`integrations.plugins` loads this module, and calls `register`, in every process of vLLM's own.
"""

from vllm.model_executor.layers.quantization import register_quantization_config

from rtn_tensor.integrations.vllm.quantization import RTNQuantizationConfig


def register() -> None:
    """Makes "rtn" one of vLLM's quantization methods; called again, it does nothing new."""
    register_quantization_config("rtn")(RTNQuantizationConfig)
