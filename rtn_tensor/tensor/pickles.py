"""What unpickling makes a quantized tensor of, which a file may have wrong in any way."""

from typing import Any

from rtn_tensor.formats import check_version
from rtn_tensor.tensor.attributes import ATTRIBUTES, DEFAULTS, OPTIONAL, OPTIONAL_PLANES, PLANES
from rtn_tensor.wording import with_article

NOT_OF_OLD = {name: DEFAULTS[name] for name in ("version", *OPTIONAL)}


def set_state(w: Any, state: Any) -> None:
    """What unpickling calls as `__setstate__`, with what a file says: `__new__` and `__init__` have not
    run.

    Raises:
        ValueError, TypeError: it is not the state of such a tensor, or its parts do not fit one another.
    """
    # torch adds the slots of a class, and there are none.
    if isinstance(state, tuple) and len(state) == 2 and not state[1]:
        state = state[0]
    names = [*PLANES, *ATTRIBUTES]
    if not isinstance(state, dict) or (
        missing := [name for name in names if name not in {**NOT_OF_OLD, **state}]
    ):
        lacking = (
            f"lacks {', '.join(missing)}"
            if isinstance(state, dict)
            else f"is {with_article(type(state).__name__)}"
        )
        raise ValueError(
            f"the state of {with_article(type(w).__name__)} {lacking}; the file is damaged, "
            "or of another library"
        )
    state = {**NOT_OF_OLD, **state}
    check_version(state["version"])  # what is new is made without one
    made = type(w)(**{name: state.get(name) for name in (*names, *OPTIONAL_PLANES)})
    for plane in made.planes.values():
        # Rows of one memory would make a tensor of any size from a file of a few bytes.
        if not plane.is_meta and plane.nbytes > plane.untyped_storage().nbytes():
            raise ValueError(
                f"a plane of shape {tuple(plane.shape)} has its rows in the same memory; "
                "save a contiguous() weight"
            )
    mine, due = ((t.shape, t.dtype, t.device) for t in (w, made))
    if mine != due:
        raise ValueError(
            f"the file says that the weight has {mine}, and its planes that it has {due}; the file is damaged"
        )
    unsaid = {"_flat", *(name for name in OPTIONAL if state[name] is None)}
    vars(w).update({name: value for name, value in state.items() if name not in unsaid})
