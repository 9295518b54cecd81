"""Errors that name the weight that they are about."""

from typing import Any

from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from rtn_tensor.tensor.callers import callers


def _is_weight(w: Any) -> bool:
    return isinstance(w, TorchAOBaseTensor) and hasattr(w, "qdata")


def is_traced(w: Any) -> bool:
    """Whether `w` is what a compiler traces with, in place of a weight."""
    return _is_weight(w) and type(w.qdata) not in (Tensor, nn.Parameter)


def name_of(w: Any) -> str | None:
    """What a model calls `w`. `quantize_` and `load` write the name on it, as `fqn`; transformers and torchao
    do not, and then the outermost module that is running knows it."""
    name = getattr(w, "fqn", None)
    if name or not _is_weight(w) or is_traced(w) or w.qdata.is_meta:
        return name
    address = w.qdata.data_ptr()
    for frame in callers():
        if isinstance(model := frame.f_locals.get("self"), nn.Module):
            for fqn, p in model.named_parameters():
                qdata = p.qdata if _is_weight(p) else None  # type: ignore[attr-defined]
                if qdata is not None and 0 <= address - qdata.data_ptr() < max(qdata.nbytes, 1):
                    name = fqn
    return name


# Dynamo leaves to eager code what is not implemented for its fake tensors, so that a misuse raises the same
# there; other errors it wraps.
_WHILE_TRACING: dict[type[Exception], type[Exception]] = {
    **{
        kind: type(kind.__name__, (kind, NotImplementedError), {})
        for kind in (ValueError, TypeError, IndexError)
    },
    RuntimeError: NotImplementedError,  # which is one
}


def named_error(w: Tensor | None, what: str, kind: type[Exception] = ValueError) -> Exception:
    """An error that names the weight."""
    name = name_of(w)
    return (_WHILE_TRACING.get(kind, kind) if is_traced(w) else kind)(f"{name}: {what}" if name else what)


def or_float(w: Tensor) -> str:
    """What to do where a model does with the weight `w` what no quantized one can do: MobileBERT joins two of
    different columns."""
    name = name_of(w)
    return f"; a weight that its model uses so stays float by the rule ({name!r}, None)" if name else ""
