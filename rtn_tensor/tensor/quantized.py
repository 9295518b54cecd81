"""`RTNQuantizedTensor`: two planes that slice like the weight they stand for, and one table of the ops it
knows."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from rtn_tensor import _torch, ops, registration
from rtn_tensor._torch import is_batchedtensor, tree_leaves, tree_map_only
from rtn_tensor.formats import (
    ASYMMETRIC,
    FLOAT_DTYPES,
    check_activations,
    check_format,
    check_planes,
    format_of,
    new_planes,
    or_default,
    scale_dtype_of,
    shown_apart,
    version_of,
)
from rtn_tensor.tensor import sharding
from rtn_tensor.tensor.attributes import ATTRIBUTES, FORMAT, OPTIONAL, PLANES, ParameterLike, carried
from rtn_tensor.tensor.callers import called_by, is_computed_anew
from rtn_tensor.tensor.errors import is_traced, named_error, or_float
from rtn_tensor.tensor.layout import layout_of
from rtn_tensor.tensor.memory import WithoutMemory
from rtn_tensor.tensor.pickles import set_state
from rtn_tensor.wording import with_article

aten = torch.ops.aten


class RTNQuantizedTensor(WithoutMemory, TorchAOBaseTensor, metaclass=ParameterLike):
    """A float weight `[..., N, K]` held as round-to-nearest integers and one scale per group.

    Attributes:
        qdata: `[..., N, B]` uint8, the packed integers (`rtn_tensor.formats` gives the order); B = 16 *
            ceil(K * bits / 128).
        scale: `[..., N, G]`, G = ceil(K / group_size), in the dtype that the tensor shows as its own, or in
            another where `float_dtype` is given. With "search8" uint8, the bits of float8_e4m3fn, and S is
            2^-7 times that.
        zero: `[..., N, G]` int8, the integer that stands for 0 in each group, of an asymmetric weight; else
            None.
        bits: as in `RTNConfig`.
        group_size: as there.
        scale_method: as there.
        in_features: K.
        transposed: whether the tensor's last two dims stand swapped, as after `t()`; the planes never move.
        version: of what the planes mean, the earliest that has them all; a later one than this library's is
            refused.
        float_dtype: the dtype that the tensor shows where its scale has another, as float16 scales of GPTQ's
            in a bfloat16 model; else None. `.to(dtype)` then changes this, and keeps the scale.
        activations: as in `RTNConfig`, of products over in_features; `set_activations_` changes it.

    The tensor has the shape and dtype of the weight it stands for, never requires a gradient (asking for one
    is ignored), passes gradients to its inputs, and gives views that alias it. Rows (and leading dims) slice
    anywhere; columns at multiples of `group_size`, or to the end. `copy_` from a float tensor quantizes in
    place. An op it does not know raises NotImplementedError.

    Called with one tensor, as `nn.Parameter` is, the class gives a parameter: an alias of a quantized tensor;
    or a float tensor quantized in the format that keywords name (`type(w)(tensor, requires_grad=False,
    **vars(w))` gives what `w` would be if it held `tensor`).
    """

    __module__ = "rtn_tensor.tensor"  # where every pickle that was ever written looks for it

    tensor_data_names = PLANES
    # For torchao's writer of safetensors: transformers reads planes of a few names only, and this is the one.
    optional_tensor_data_names = ["zero_point"]
    tensor_attribute_names = FORMAT

    qdata: Tensor
    scale: Tensor
    zero: Tensor | None = None
    bits: int
    group_size: int
    scale_method: str
    in_features: int
    transposed: bool
    version: int = 1
    float_dtype: torch.dtype | None = None
    activations: str | None = None
    # What is known of the weight beside its numbers, where it is: what its model calls it; the names that it
    # was shared with, whose weight stayed float; the rows of its shard, with FSDP2's padding. Like what users
    # set, it goes along with each copy and view.
    fqn: str
    untied_from: list[str]
    _padded_rows: int
    # What `__tensor_flatten__` gives, until an attribute changes.
    _flat: tuple[list[str], tuple] | None = None
    # True of what `view(-1)` gives: its shape is kept, and a concatenation of such is no weight.
    _is_flat = False
    # True of some columns of rows that have one scale: to write it would change the other columns.
    _shares_scale = False

    @staticmethod
    def __new__(
        cls,
        qdata,
        scale,
        bits,
        group_size,
        scale_method,
        in_features,
        transposed=False,
        version=None,
        float_dtype=None,
        zero=None,
        activations=None,
    ):
        # A compiler may hold these two as symbols.
        bits, group_size = (int(n) if isinstance(n, torch.SymInt) else n for n in (bits, group_size))
        apart = shown_apart(scale, float_dtype) if isinstance(scale, Tensor) else None
        version = version_of(zero, apart, activations) if version is None else version
        about = (bits, group_size, in_features, scale_method, transposed, version)
        check_planes(qdata, scale, *about, zero, apart, activations)
        layout = layout_of(qdata, bits, in_features, transposed)
        return _torch.wrapper(cls, *layout, dtype=apart or scale.dtype, device=qdata.device)

    def __init__(
        self,
        qdata,
        scale,
        bits,
        group_size,
        scale_method,
        in_features,
        transposed=False,
        version=None,
        float_dtype=None,
        zero=None,
        activations=None,
    ):
        self.qdata = qdata
        self.scale = scale
        if zero is not None:
            self.zero = zero
        self.bits = int(bits)
        self.group_size = int(group_size)
        self.scale_method = scale_method
        self.in_features = in_features
        self.transposed = transposed
        apart = shown_apart(scale, float_dtype)
        if apart is not None:
            self.float_dtype = apart
        if activations is not None:
            self.activations = activations
        self.version = version_of(zero, apart, activations) if version is None else version

    @property
    def planes(self) -> dict[str, Tensor]:
        """The planes that there are, by name."""
        planes = {"qdata": self.qdata, "scale": self.scale}
        return planes if self.zero is None else planes | {"zero": self.zero}

    @property
    def optional_tensor_attribute_names(self) -> list[str]:
        """For torchao's writer, which would write one that is None, too."""
        return [name for name in ATTRIBUTES if name not in FORMAT and getattr(self, name) is not None]

    @property
    def zero_point(self) -> Tensor | None:
        """`zero`, by the name that it has in files."""
        return self.zero

    @classmethod
    def from_float(
        cls,
        w: Tensor,
        bits: int = 4,
        group_size: int | None = None,
        scale_method: str | None = None,
        dtype: torch.dtype | None = None,
        activations: str | None = None,
    ) -> "RTNQuantizedTensor":
        """Quantizes `w [..., N, K]` (float32, bfloat16 or float16). `dtype`, by default `w`'s, is that of the
        scale and so the tensor's; `group_size` and `scale_method` by default those of `rtn`.

        A NaN or inf in `w` is not looked for: it makes its group NaN. `quantize_` looks.

        Raises:
            ValueError: an unknown format, `w` has no dims, or is a sample inside `torch.vmap`.
            TypeError: `w` is already quantized or not of a float dtype above.
        """
        group_size, scale_method = or_default(bits, group_size, scale_method)
        check_format(bits, group_size, scale_method)
        check_activations(activations)
        if not isinstance(w, Tensor):
            raise TypeError(
                f"cannot quantize {with_article(type(w).__name__)}; give a torch.Tensor, a weight [..., N, K]"
            )
        if why := registration.unfit(w):
            raise TypeError(f"cannot quantize w, which is {why}")
        if isinstance(w, TorchAOBaseTensor):
            raise TypeError(
                f"already quantized: got {with_article(type(w).__name__)}; quantize the float weight, or "
                "call .dequantize() first"
            )
        if w.dim() == 0:
            raise ValueError("cannot quantize a tensor without dims; give a weight [..., N, K]")
        if is_batchedtensor(w):
            raise ValueError(
                "from_float cannot run inside vmap; w may have leading dims [..., N, K]: "
                "quantize it whole, outside"
            )
        for got in (w.dtype, dtype or w.dtype):
            check_dtype(got)
        dtype = dtype or w.dtype
        qdata, scale, *zero = ops.quantize(w, bits, group_size, scale_method, dtype)
        more: Any = {"float_dtype": dtype, "zero": zero[0] if zero else None, "activations": activations}
        return cls(qdata, scale, bits, group_size, scale_method, w.shape[-1], **more)

    @classmethod
    def empty(
        cls,
        *shape: int,
        bits: int = 4,
        group_size: int | None = None,
        scale_method: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        scale_dtype: torch.dtype | None = None,
        activations: str | None = None,
    ) -> "RTNQuantizedTensor":
        """An uninitialized `[..., N, K]` tensor, for `copy_` to fill; on any device, meta included. The scale
        is in `scale_dtype`, by default the tensor's."""
        group_size, scale_method = or_default(bits, group_size, scale_method)
        check_format(bits, group_size, scale_method)
        check_dtype(dtype)
        if not shape or not all(isinstance(n, int | torch.SymInt) for n in shape):
            raise TypeError(f"shape is {shape}; give its sizes one by one, as in empty(4096, 1024)")
        zero = scale_method in ASYMMETRIC
        check_dtype(scale_dtype or dtype)
        of_scale = scale_dtype_of(scale_method, scale_dtype or dtype)
        planes = new_planes(torch.empty, shape, bits, group_size, of_scale, zero, device=device)
        made: Any = dict(zip(FORMAT, (bits, group_size, scale_method, shape[-1]), strict=False))
        return cls(**planes, **made, float_dtype=dtype, activations=activations)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The plain tensor (q - zero) * S, computed in fp32 and rounded once to `dtype` (by default the
        tensor's), in its shape.

        Raises:
            TypeError: `dtype` is none of floats.
            ValueError: PEFT asks for it, to merge an adapter into a weight [in_features, out_features].
        """
        if self.transposed and not torch.compiler.is_compiling() and called_by("peft.tuners.lora.torchao"):
            raise named_error(
                self,
                "PEFT merges no adapter into a quantized weight of a Conv1D: it would leave a float one that "
                "no state_dict holds; save the adapter, merge it into the float model, and quantize that",
            )
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise named_error(
                self,
                f"dtype is {dtype!r}; dequantize gives floats, as torch.float32 or torch.bfloat16",
                TypeError,
            )
        w = ops.dequantize(
            self.qdata,
            self.scale,
            self.bits,
            self.group_size,
            self.in_features,
            dtype or self.float_dtype or self.scale.dtype,
            self.zero,
        )
        return w.mT if self.transposed else w

    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        # The guards of a compiled call ask twice for every weight, and compare: the base would make it anew,
        # 0.8 us each time, where this takes 0.07; and a tuple compares in half the time of the base's dict.
        flat = self._flat
        if flat is None:
            attributes = {name: getattr(self, name) for name in FORMAT}
            attributes["scale_method"] = _MethodOf(self)
            if self.float_dtype is not None or self.activations is not None:
                attributes |= {"float_dtype": self.float_dtype, "activations": self.activations}
            flat = self._flat = [*self.planes], tuple(attributes.values())
        return flat

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # Of the class: `swap_tensors` sets `__class__`.
        if name in ATTRIBUTES or name in ("fqn", "zero"):
            vars(self).pop("_flat", None)

    # Before a copy or a file is made of all that lies on the tensor.
    def _clear_non_serializable_cached_data(self) -> None:
        super()._clear_non_serializable_cached_data()
        vars(self).pop("_flat", None)
        for name in ("zero", *OPTIONAL):
            if getattr(self, name) is None:  # as of a weight that never had any
                vars(self).pop(name, None)

    @classmethod
    def __tensor_unflatten__(cls, tensor_data_dict, tensor_attributes, outer_size, outer_stride):
        attributes = dict(zip(ATTRIBUTES, tensor_attributes, strict=False))
        name = getattr(method := attributes["scale_method"], "fqn", None)
        attributes["scale_method"] = str(method)
        # A graph with dynamic shapes gives in_features as the symbol it was traced with; the size it ran with
        # is in outer_size.
        if outer_size is not None:  # torchao's unwrap_tensor_subclass gives none
            attributes["in_features"] = outer_size[-2 if attributes["transposed"] else -1]
        new = cls(**tensor_data_dict, **attributes)
        # What a graph gives may be of another weight than the one that it was traced with.
        if name and is_traced(new):
            new.fqn = name
        return new

    def data_ptr(self) -> int:
        # torch copies and pickles with overrides off, and knows by a 0 that the data lies elsewhere; it would
        # get the offset.
        return super().data_ptr() if _torch.overrides_are_on() else 0

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        parts = [f"shape={tuple(self.shape)}", f"bits={self.bits}", f"group_size={self.group_size}"]
        if self.scale_method != "absmax":
            parts.append(f"scale_method={self.scale_method!r}")
        if self.activations is not None:
            parts.append(f"activations={self.activations!r}")
        if self.transposed:
            parts.append("transposed=True")
        return f"{type(self).__name__}({', '.join(parts)}, dtype={self.dtype}, device={self.device.type!r})"

    def _stable_hash_for_caching(self) -> str:
        """What a compiled graph depends on, for torch's cache of them on disk."""
        planes = [
            (p.dtype, tuple(p.shape), p.stride(), p.storage_offset(), p.device) for p in self.planes.values()
        ]
        attributes = [getattr(self, name) for name in ATTRIBUTES]
        return hashlib.sha256(
            repr((type(self).__qualname__, _sources(), attributes, planes)).encode()
        ).hexdigest()

    fsdp_pre_all_gather = sharding.pre_all_gather
    fsdp_post_all_gather = sharding.post_all_gather

    @property
    def nbytes(self) -> int:
        """Bytes of the planes."""
        return sum(plane.nbytes for plane in self.planes.values())

    def element_size(self) -> float:  # type: ignore[override]
        """Bytes per element, a fraction (0.53125 for 4 bits and one 16-bit scale per 64), so that numel() *
        element_size() is what is held.

        transformers' `get_memory_footprint` and its device maps multiply so. Dynamo asks no class: in a
        compiled function it is the size of the dtype, and `nbytes` is what it is elsewhere."""
        return self.nbytes / self.numel() if self.numel() else float(self.scale.itemsize)

    def _quantization_type(self) -> str:
        """What torchao, and `print(model)`, show of a layer."""
        method = "" if self.scale_method == "absmax" else f", scale_method={self.scale_method!r}"
        activations = "" if self.activations is None else f", activations={self.activations!r}"
        return f"bits={self.bits}, group_size={self.group_size}{method}{activations}"

    # An operator of torch's own takes a TypeError from below for "not mine", and Python then says no more
    # than "unsupported operand".
    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other) if isinstance(other, Tensor) else NotImplemented

    def __rmatmul__(self, other: Any) -> Any:
        return torch.matmul(other, self) if isinstance(other, Tensor) else NotImplemented

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        handler = cls._ATEN_OP_TABLE[cls].get(func)
        if handler is not None:
            return handler(func, types, args, kwargs or {})
        # Below autograd (in inference mode, say) ops that torch composes of others, like mT and narrow,
        # arrive whole.
        out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out
        if not func._schema.is_mutable and is_computed_anew():
            args, kwargs = tree_map_only(
                RTNQuantizedTensor, RTNQuantizedTensor.dequantize, (args, kwargs or {})
            )
            return func(*args, **kwargs)
        w = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, RTNQuantizedTensor))
        way_out = f"call it on .dequantize(), which gives a plain tensor{or_float(w)}"
        if func._schema.is_mutable:
            way_out = "compute the new numbers on .dequantize(), and copy_ them into the weight"
        raise named_error(w, f"{cls.__name__} does not implement {func}; {way_out}", NotImplementedError)


# Dynamo compiles, each by itself, the functions that run below a frame that it gave up, and fails on what
# users hung on a tensor.
_torch.never_compile_below(RTNQuantizedTensor.__torch_dispatch__.__func__.__code__)
# The base gives every class its own.
RTNQuantizedTensor.__setstate__ = set_state  # type: ignore[method-assign]
torch.serialization.add_safe_globals([RTNQuantizedTensor])

on_op = RTNQuantizedTensor.implements
on_function = RTNQuantizedTensor.implements_torch_function
# torchao's knows no copy=True and makes the copy an alias of the original, on another device too; torch
# composes it of `_to_copy`.
RTNQuantizedTensor._ATEN_OP_TABLE[RTNQuantizedTensor].pop(aten.to.dtype_layout)


@functools.cache
def _sources() -> str:
    """A digest of this package. A compiled graph holds what the functions here made of each op, so another
    release must not take it."""
    return hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
    ).hexdigest()


def check_dtype(dtype: torch.dtype, w: Tensor | None = None) -> None:
    if dtype not in FLOAT_DTYPES:
        raise named_error(
            w,
            f"dtype {dtype} is not supported for a quantized weight; use {', '.join(map(str, FLOAT_DTYPES))}",
            TypeError,
        )


class _MethodOf(str):
    """A weight's scale_method, and beside it what a compiler is to know of the weight for the errors that it
    meets, yet not to compare, so that layers of other names share one graph: its name."""

    fqn: str | None

    def __new__(cls, w: RTNQuantizedTensor):
        new = super().__new__(cls, w.scale_method)
        new.fqn = getattr(w, "fqn", None)
        return new

    def __reduce__(self):
        return str, (str(self),)


def rebuilt(w: RTNQuantizedTensor, planes: Mapping[str, Tensor], **changed: Any) -> RTNQuantizedTensor:
    """A tensor of `w`'s format over other planes; what users set on `w` and what is known of it go along."""
    attributes = {name: getattr(w, name) for name in ATTRIBUTES} | changed
    # torch refuses an inference tensor as a view of one that is none, which `w.t()` would be in inference
    # mode.
    with torch.inference_mode(w.is_inference()):
        new = type(w)(**planes, **attributes)
    vars(new).update(carried(vars(w)))
    if w._shares_scale and _torch.is_alias_of(planes["scale"], w.scale):  # a copy has a scale of its own
        new._shares_scale = True
    return new


def by_plane(w: RTNQuantizedTensor, change: Callable[[Tensor], Tensor], **changed: Any) -> RTNQuantizedTensor:
    """`rebuilt` over what `change` makes of each plane."""
    return rebuilt(w, {name: change(plane) for name, plane in w.planes.items()}, **changed)


def dim_of_planes(w: RTNQuantizedTensor, dim: int) -> int:
    """The planes' dim for the tensor's `dim`; the last one is packed."""
    if not -w.dim() <= dim < w.dim():
        raise IndexError(f"dim {dim} is out of range for a tensor of {w.dim()} dims")
    dim %= w.dim()
    return 2 * w.dim() - 3 - dim if w.transposed and dim >= w.dim() - 2 else dim


def is_packed(w: RTNQuantizedTensor, dim: int) -> bool:
    return dim_of_planes(w, dim) == w.dim() - 1


def same_format(a: RTNQuantizedTensor, b: RTNQuantizedTensor) -> bool:
    """Whether planes of the one could be planes of the other."""
    first, second = ((format_of(w), w.transposed, w.scale.dtype, w.float_dtype, [*w.planes]) for w in (a, b))
    return first == second
