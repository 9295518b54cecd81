"""What vLLM and SGLang call in every process of their own (entry points `vllm.general_plugins` and
`sglang.srt.plugins`), for users of "rtn" and for all others, whom it must not hinder."""

import logging
from importlib import import_module

import rtn_tensor

logger = logging.getLogger(__name__)

TRIED = {"vllm": "vLLM 0.32 and 0.33", "sglang": "SGLang 0.5.23"}


def _register(engine: str) -> None:
    try:
        import_module(f"rtn_tensor.integrations.{engine}").register()
    except Exception as error:  # of any kind, as what moved within an engine is not known
        there = getattr(import_module(engine), "__version__", "unknown")
        why = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning(
            "quantization 'rtn' is not there: rtn-tensor %s was made for %s, and this is version %s (%s)",
            *(rtn_tensor.__version__, TRIED[engine], there, why),
        )


def register_vllm() -> None:
    """Makes "rtn" one of vLLM's quantization methods, or logs one line that says why not."""
    _register("vllm")


def register_sglang() -> None:
    """Makes "rtn" one of SGLang's quantization methods, or logs one line that says why not."""
    _register("sglang")
