"""Who calls: some callers are to be answered otherwise than a user, and nothing but the stack tells."""

import sys
from collections.abc import Callable
from types import FrameType

import torch


def _callers() -> list[FrameType]:
    """The frames of the functions that are running, from the one that asks outwards. A compiler, which traces
    what a dispatcher calls outside of its graphs, too, is to leave it alone."""
    frames, frame = [], sys._getframe().f_back
    while frame:
        if frames or frame.f_globals.get("__name__", "").startswith("rtn_tensor."):
            frames.append(frame)
        frame = frame.f_back
    return frames


callers: Callable[[], list[FrameType]] = torch.compiler.disable(_callers)  # type: ignore[assignment]


# Those who compute anew from a weight what is to lie in one: PEFT where it merges an adapter, or takes it out
# again, and gives the result to `weight.data` (an error would come after the adapter is trained, too late);
# and transformers where new tokens get the others' mean.
_COMPUTES_ANEW = {
    "peft.": ("merge", "unmerge"),
    "transformers.": ("_init_added_embeddings_weights_with_mean", "_init_added_lm_head_weights_with_mean"),
}


def is_computed_anew() -> bool:
    """Whether one of those computes with the weight. Nothing but the stack tells.

    PEFT's adapter of nn.MultiheadAttention does not: it merges at every call, and would leave a float weight
    behind."""
    return any(
        frame.f_code.co_name in names
        and frame.f_globals.get("__name__", "").startswith(package)
        and type(frame.f_locals.get("self")).__name__ != "MultiheadAttention"
        for frame in callers()
        for package, names in _COMPUTES_ANEW.items()
    )


def called_by(*packages: str) -> bool:
    """Whether a module of one of `packages` called the op that is being handled."""
    modules = (frame.f_globals.get("__name__", "") for frame in callers())
    return next(
        (name for name in modules if name.partition(".")[0] not in ("rtn_tensor", "torchao")), ""
    ).startswith(packages)
