"""What lies on a quantized weight beside its planes: its format, what is known of it, and what users set on
it."""

from typing import Any

from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from rtn_tensor.formats import FORMAT_KEYS

PLANES = ["qdata", "scale"]
OPTIONAL_PLANES = ["zero"]  # which lie beside the scales, as many numbers as there are of these
FORMAT = ["bits", "group_size", "scale_method", "in_features", "transposed", "version"]
# Those that are in a file only where they are given.
OPTIONAL = ["float_dtype", "activations"]
ATTRIBUTES = [*FORMAT, *OPTIONAL]
# What those are of which a file says nothing.
DEFAULTS = {"transposed": False, "version": 1, "float_dtype": None, "activations": None}
# What a copy or view has of its own.
_MADE_ANEW = {
    *PLANES,
    *OPTIONAL_PLANES,
    *ATTRIBUTES,
    "_is_param",
    "_is_flat",
    "_shares_scale",
    "_flat",
}
_KNOWN_OF_WEIGHT = {"fqn", "untied_from", "_padded_rows"}


def carried(attributes: dict[str, Any]) -> dict[str, Any]:
    """Of all that lies on a weight, what a copy or view of it has, too."""
    return {name: value for name, value in attributes.items() if name not in _MADE_ANEW}


def user_attributes(w: Tensor) -> dict[str, Any]:
    """What users set on `w`: vLLM's weight_loader, say."""
    return {name: value for name, value in carried(vars(w)).items() if name not in _KNOWN_OF_WEIGHT}


class ParameterLike(type(TorchAOBaseTensor)):
    """A class that is called like `nn.Parameter`, too: `type(w)(tensor, requires_grad=False, **vars(w))`, as
    accelerate does."""

    def __call__(cls: Any, *args: Any, requires_grad: bool = False, **kwargs: Any) -> Any:
        # That call gives one tensor, and of the planes' names none, or all of them where `vars(w)` goes
        # along.
        if len(args) != 1 or ("qdata" in kwargs) != ("scale" in kwargs):
            return super().__call__(*args, **kwargs)
        return _as_parameter(cls, args[0], kwargs)


def _as_parameter(cls: Any, tensor: Tensor, attributes: dict[str, Any]) -> Tensor:
    """`tensor` as a parameter with what a copy has of `attributes`, quantized in the format that they give if
    it is a float tensor."""
    if not isinstance(tensor, cls):
        if not isinstance(tensor, Tensor) or "bits" not in attributes:
            got = (
                f"a float tensor of shape {tuple(tensor.shape)}"
                if isinstance(tensor, Tensor)
                else repr(tensor)
            )
            raise TypeError(
                f"{cls.__name__}({got}) names no format; use {cls.__name__}.from_float(tensor, bits, "
                "group_size), or copy_ the tensor into "
                "the quantized weight, which keeps its format"
            )
        arguments = {name: attributes[name] for name in FORMAT_KEYS if name in attributes}
        turned = attributes.get("transposed", False)
        tensor = cls.from_float(tensor.mT if turned else tensor, **arguments)
        tensor = tensor.mT if turned else tensor
    new = nn.Parameter(tensor, requires_grad=False)
    vars(new).update(carried(attributes))
    return new
