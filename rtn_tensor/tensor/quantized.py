"""`RTNQuantizedTensor`: two planes that slice like the weight they stand for, and one table of the ops it knows."""

import functools
import hashlib
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from rtn_tensor import _torch, ops, registration
from rtn_tensor._torch import is_batchedtensor, return_and_correct_aliasing, tree_leaves, tree_map_only
from rtn_tensor.formats import FLOAT_DTYPES, FORMATS, VERSION, check_format, check_planes, groups
from rtn_tensor.reference import round_scale

aten = torch.ops.aten


class _ParameterLike(type(TorchAOBaseTensor)):
    """A class that is called like `nn.Parameter`, too: `type(w)(tensor, requires_grad=False, **vars(w))`, as accelerate does."""

    def __call__(cls: Any, *args: Any, requires_grad: bool = False, **kwargs: Any) -> Any:
        # That call gives one tensor, and of the planes' names none, or all of them where `vars(w)` goes along.
        if len(args) != 1 or ("qdata" in kwargs) != ("scale" in kwargs):
            return super().__call__(*args, **kwargs)
        return _as_parameter(cls, args[0], kwargs)


class RTNQuantizedTensor(TorchAOBaseTensor, metaclass=_ParameterLike):
    """A float weight `[..., N, K]` held as round-to-nearest integers and one scale a group.

    Attributes:
        qdata: `[..., N, B]` uint8, the packed integers (`rtn_tensor.formats` gives the order); B = 16 * ceil(K * bits / 128).
        scale: `[..., N, G]`, G = ceil(K / group_size), in the dtype that the tensor shows as its own.
        bits, group_size, scale_method: as in `RTNConfig`.
        in_features: K.
        transposed: whether the tensor's last two dims stand swapped, as after `t()`; the planes never move.
        version: of what the planes mean; a later one than this library's is refused.

    The tensor has the shape and dtype of the weight it stands for, never requires a gradient (asking for one is ignored), passes
    gradients to its inputs, and gives views that alias it. Rows (and leading dims) slice anywhere; columns at multiples of
    `group_size`, or to the end. `copy_` from a float tensor quantizes in place. An op it does not know raises NotImplementedError.

    Called with one tensor, as `nn.Parameter` is, the class gives a parameter: an alias of a quantized tensor; or a float tensor quantized
    in the format that keywords name (`type(w)(tensor, requires_grad=False, **vars(w))` gives what `w` would be if it held `tensor`).
    """

    __module__ = "rtn_tensor.tensor"  # where every pickle that was ever written looks for it

    tensor_data_names = ["qdata", "scale"]
    tensor_attribute_names = ["bits", "group_size", "scale_method", "in_features", "transposed", "version"]

    qdata: Tensor
    scale: Tensor
    bits: int
    group_size: int
    scale_method: str
    in_features: int
    transposed: bool
    version: int = VERSION
    _padded_rows: int
    _flat: tuple[list[str], tuple] | None = None  # what `__tensor_flatten__` gives, until an attribute changes
    _is_flat = False  # true of what `view(-1)` gives: its shape is kept, and a concatenation of such is no weight
    _shares_scale = False  # true of some columns of rows that have one scale: to write it would change the other columns

    @staticmethod
    def __new__(cls, qdata, scale, bits, group_size, scale_method, in_features, transposed=False, version=VERSION):
        # A compiler may hold these two as symbols.
        bits, group_size = (int(n) if isinstance(n, torch.SymInt) else n for n in (bits, group_size))
        check_planes(qdata, scale, bits, group_size, in_features, scale_method, transposed, version)
        layout = _layout(qdata, bits, in_features, transposed)
        return _torch.wrapper(cls, *layout, dtype=scale.dtype, device=qdata.device)

    def __init__(self, qdata, scale, bits, group_size, scale_method, in_features, transposed=False, version=VERSION):
        self.qdata = qdata
        self.scale = scale
        self.bits = int(bits)
        self.group_size = int(group_size)
        self.scale_method = scale_method
        self.in_features = in_features
        self.transposed = transposed
        self.version = version

    @classmethod
    def from_float(
        cls, w: Tensor, bits: int = 4, group_size: int = 128, scale_method: str = "absmax", dtype: torch.dtype | None = None
    ) -> "RTNQuantizedTensor":
        """Quantizes `w [..., N, K]` (float32, bfloat16 or float16). `dtype`, by default `w`'s, is that of the scale and so the tensor's.

        A NaN or inf in `w` is not looked for: it makes its group NaN. `quantize_` looks.

        Raises:
            ValueError: an unknown format, `w` has no dims, or is a sample inside `torch.vmap`.
            TypeError: `w` is already quantized or not of a float dtype above.
        """
        check_format(bits, group_size, scale_method)
        if not isinstance(w, Tensor):
            raise TypeError(f"cannot quantize a {type(w).__name__}; give a torch.Tensor, a weight [..., N, K]")
        if why := registration.unfit(w):
            raise TypeError(f"cannot quantize w, which is {why}")
        if isinstance(w, TorchAOBaseTensor):
            raise TypeError(f"already quantized: got a {type(w).__name__}; quantize the float weight, or call .dequantize() first")
        if w.dim() == 0:
            raise ValueError("cannot quantize a tensor without dims; give a weight [..., N, K]")
        if is_batchedtensor(w):
            raise ValueError("from_float cannot run inside vmap; w may have leading dims [..., N, K]: quantize it whole, outside")
        for got in (w.dtype, dtype or w.dtype):
            _check_dtype(got)
        qdata, scale = ops.quantize(w, bits, group_size, scale_method, dtype or w.dtype)
        return cls(qdata, scale, bits, group_size, scale_method, w.shape[-1])

    @classmethod
    def empty(
        cls,
        *shape: int,
        bits: int = 4,
        group_size: int = 128,
        scale_method: str = "absmax",
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> "RTNQuantizedTensor":
        """An uninitialized `[..., N, K]` tensor, for `copy_` to fill; on any device, meta included."""
        check_format(bits, group_size, scale_method)
        _check_dtype(dtype)
        planes = _new_planes(torch.empty, shape, bits, group_size, dtype, device=device)
        return cls(*planes, bits, group_size, scale_method, shape[-1])

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The plain tensor q * S, computed in fp32 and rounded once to `dtype` (by default the tensor's), in its shape."""
        w = ops.dequantize(self.qdata, self.scale, self.bits, self.group_size, self.in_features, dtype or self.scale.dtype)
        return w.mT if self.transposed else w

    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        # The guards of a compiled call ask twice for every weight, and compare: the base would make it anew, 0.8 us each time, where this
        # takes 0.07; and a tuple compares in half the time of the base's dict.
        flat = self._flat
        if flat is None:
            attributes = {name: getattr(self, name) for name in self.tensor_attribute_names}
            attributes["scale_method"] = _MethodOf(self)
            flat = self._flat = self.tensor_data_names, tuple(attributes.values())
        return flat

    def _set_state(self, state: Any) -> None:
        """What unpickling calls as `__setstate__`, with what a file says: `__new__` and `__init__` have not run.

        Raises:
            ValueError, TypeError: it is not the state of such a tensor, or its parts do not fit one another.
        """
        if isinstance(state, tuple) and len(state) == 2 and not state[1]:  # torch adds the slots of a class, and there are none
            state = state[0]
        names = [*self.tensor_data_names, *self.tensor_attribute_names]
        if not isinstance(state, dict) or (missing := [name for name in names if name not in {"version": VERSION, **state}]):
            lacking = f"lacks {', '.join(missing)}" if isinstance(state, dict) else f"is a {type(state).__name__}"
            raise ValueError(f"the state of a {type(self).__name__} {lacking}; the file is damaged, or of another library")
        state = {"version": VERSION, **state}
        made = type(self)(*(state[name] for name in names))
        for plane in (made.qdata, made.scale):
            # Rows of one memory would make a tensor of any size from a file of a few bytes.
            if not plane.is_meta and plane.nbytes > plane.untyped_storage().nbytes():
                raise ValueError(f"a plane of shape {tuple(plane.shape)} has its rows in the same memory; save a contiguous() weight")
        mine, due = ((t.shape, t.dtype, t.device) for t in (self, made))
        if mine != due:
            raise ValueError(f"the file says that the weight has {mine}, and its planes that it has {due}; the file is damaged")
        vars(self).update({name: value for name, value in state.items() if name != "_flat"})

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in RTNQuantizedTensor.tensor_attribute_names or name == "fqn":  # of the class: `swap_tensors` sets `__class__`
            vars(self).pop("_flat", None)

    def _clear_non_serializable_cached_data(self) -> None:  # before a copy or a file is made of all that lies on the tensor
        super()._clear_non_serializable_cached_data()
        vars(self).pop("_flat", None)

    @classmethod
    def __tensor_unflatten__(cls, tensor_data_dict, tensor_attributes, outer_size, outer_stride):
        attributes = dict(zip(cls.tensor_attribute_names, tensor_attributes, strict=True))
        name = getattr(method := attributes["scale_method"], "fqn", None)
        attributes["scale_method"] = str(method)
        # A graph with dynamic shapes gives in_features as the symbol it was traced with; the size it ran with is in outer_size.
        if outer_size is not None:  # torchao's unwrap_tensor_subclass gives none
            attributes["in_features"] = outer_size[-2 if attributes["transposed"] else -1]
        new = cls(**tensor_data_dict, **attributes)
        if name and _is_traced(new):  # what a graph gives may be of another weight than the one that it was traced with
            new.fqn = name
        return new

    def data_ptr(self) -> int:
        # torch copies and pickles with overrides off, and knows by a 0 that the data lies elsewhere; it would get the offset.
        return super().data_ptr() if _torch.overrides_are_on() else 0

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        parts = [f"shape={tuple(self.shape)}", f"bits={self.bits}", f"group_size={self.group_size}"]
        if self.scale_method != "absmax":
            parts.append(f"scale_method={self.scale_method!r}")
        if self.transposed:
            parts.append("transposed=True")
        return f"{type(self).__name__}({', '.join(parts)}, dtype={self.dtype}, device={self.device.type!r})"

    def _stable_hash_for_caching(self) -> str:
        """What a compiled graph depends on, for torch's cache of them on disk."""
        planes = [(p.dtype, tuple(p.shape), p.stride(), p.storage_offset(), p.device) for p in (self.qdata, self.scale)]
        attributes = [getattr(self, name) for name in self.tensor_attribute_names]
        return hashlib.sha256(repr((type(self).__qualname__, _sources(), attributes, planes)).encode()).hexdigest()

    # With this signature, the older of the two that FSDP2 knows, what is gathered need not have the tensor's own padded size.
    def fsdp_pre_all_gather(self, mesh) -> tuple[tuple[Tensor, ...], Any]:
        """What FSDP2 gathers of a shard: the planes, padded as those of the other ranks are (0.26 of a bf16 weight at int4)."""
        rows = getattr(self, "_padded_rows", len(self.qdata))
        planes = tuple(_padded(plane, rows) for plane in (self.qdata, self.scale))
        attributes = {name: getattr(self, name) for name in self.tensor_attribute_names}
        if mesh.size() > 1:
            return planes, (attributes, None)
        # Of what one rank "gathers" FSDP2 copies the first tensor only.
        return (torch.cat([plane.flatten().view(torch.uint8) for plane in planes]),), (attributes, [plane.shape for plane in planes])

    def fsdp_post_all_gather(self, outputs, metadata, param_dtype, *, out=None) -> Any:
        """The whole tensor over the gathered planes, its scale in the dtype that a MixedPrecisionPolicy asks for."""
        attributes, shapes = metadata
        if shapes is None:
            qdata, scale = outputs
        else:
            size = math.prod(shapes[0])
            qdata, scale = outputs[0][:size].view(shapes[0]), outputs[0][size:].view(self.scale.dtype).view(shapes[1])
        if out is not None:  # over the same memory as the first time, filled again
            out = out.to_local() if hasattr(out, "to_local") else out  # a DTensor, under tensor parallelism
            if out.scale.dtype != scale.dtype:
                # The same numbers again: a backward that saved them is not to see a change.
                with _torch.same_version(out.scale):
                    out.scale.copy_(scale[: len(out.scale)])
            return None
        return type(self)(qdata, scale.to(param_dtype), **attributes), outputs

    @property
    def nbytes(self) -> int:
        """Bytes of the planes."""
        return self.qdata.nbytes + self.scale.nbytes

    def element_size(self) -> float:  # type: ignore[override]
        """Bytes per element, a fraction (0.53125 for 4 bits and one 16-bit scale per 64), so that numel() * element_size() is what is held.

        transformers' `get_memory_footprint` and its device maps multiply so."""
        return self.nbytes / self.numel() if self.numel() else float(self.scale.itemsize)

    def _quantization_type(self) -> str:
        """What torchao, and `print(model)`, show of a layer."""
        method = "" if self.scale_method == "absmax" else f", scale_method={self.scale_method!r}"
        return f"bits={self.bits}, group_size={self.group_size}{method}"

    # Whoever asks for the memory of a tensor of this shape and dtype would read past that of the planes.
    def _without_memory(self, name: str) -> Exception:
        return _error(
            self, f"{name} gives the memory of plain numbers, and a quantized tensor has none; use .dequantize() first", NotImplementedError
        )

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        raise self._without_memory("DLPack")

    def __dlpack_device__(self) -> Any:
        raise self._without_memory("DLPack")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise self._without_memory("a NumPy array")

    def tolist(self) -> Any:
        raise self._without_memory("tolist()")

    @property
    def __cuda_array_interface__(self) -> Any:
        raise _error(self, "a quantized tensor has no __cuda_array_interface__; use .dequantize() first", AttributeError)

    def storage(self) -> Any:
        # safetensors asks it; NotImplementedError would mean a tensor without numbers to it, and it would read on.
        what = "a quantized weight lies in two planes, and has no storage of its own"
        way_out = "to save it, use rtn_tensor.save(model, folder) or torch.save; its memory is that of .qdata and .scale"
        raise _error(self, f"{what}; {way_out}", TypeError)

    # An operator of torch's own takes a TypeError from below for "not mine", and Python then says no more than "unsupported operand".
    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other) if isinstance(other, Tensor) else NotImplemented

    def __rmatmul__(self, other: Any) -> Any:
        return torch.matmul(other, self) if isinstance(other, Tensor) else NotImplemented

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        handler = cls._ATEN_OP_TABLE[cls].get(func)
        if handler is not None:
            return handler(func, types, args, kwargs or {})
        # Below autograd (in inference mode, say) ops that torch composes of others, like mT and narrow, arrive whole.
        out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out
        if not func._schema.is_mutable and _is_computed_anew():
            args, kwargs = tree_map_only(RTNQuantizedTensor, RTNQuantizedTensor.dequantize, (args, kwargs or {}))
            return func(*args, **kwargs)
        w = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, RTNQuantizedTensor))
        way_out = f"call it on .dequantize(), which gives a plain tensor{_or_float(w)}"
        raise _error(w, f"{cls.__name__} does not implement {func}; {way_out}", NotImplementedError)


RTNQuantizedTensor.__setstate__ = RTNQuantizedTensor._set_state  # type: ignore[method-assign]  # the base gives every class its own
torch.serialization.add_safe_globals([RTNQuantizedTensor])

_OWN = {
    *RTNQuantizedTensor.tensor_data_names,
    *RTNQuantizedTensor.tensor_attribute_names,
    "_is_param",
    "_is_flat",
    "_shares_scale",
    "_flat",
}
_op = RTNQuantizedTensor.implements
_function = RTNQuantizedTensor.implements_torch_function
# torchao's knows no copy=True and makes the copy an alias of the original, on another device too; torch composes it of `_to_copy`.
RTNQuantizedTensor._ATEN_OP_TABLE[RTNQuantizedTensor].pop(aten.to.dtype_layout)


@functools.cache
def _sources() -> str:
    """A digest of this package. A compiled graph holds what the functions here made of each op, so another release must not take it."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))).hexdigest()


def _check_dtype(dtype: torch.dtype, w: Tensor | None = None) -> None:
    if dtype not in FLOAT_DTYPES:
        raise _error(w, f"dtype {dtype} is not supported for a quantized weight; use {', '.join(map(str, FLOAT_DTYPES))}", TypeError)


class _MethodOf(str):
    """A weight's scale_method, and beside it what a compiler is to know of the weight for the errors that it meets, yet not to compare, so
    that layers of other names share one graph: its name."""

    fqn: str | None

    def __new__(cls, w: RTNQuantizedTensor):
        new = super().__new__(cls, w.scale_method)
        new.fqn = getattr(w, "fqn", None)
        return new

    def __reduce__(self):
        return str, (str(self),)


@torch.compiler.disable
def _callers() -> list[FrameType]:
    """The frames of the functions that are running, from the one that asks outwards. A compiler, which traces what a dispatcher calls
    outside of its graphs, too, is to leave it alone."""
    frames, frame = [], sys._getframe().f_back
    while frame:
        if frames or frame.f_globals.get("__name__", "").startswith("rtn_tensor."):
            frames.append(frame)
        frame = frame.f_back
    return frames


def _is_traced(w: Tensor | None) -> bool:
    """Whether `w` is what a compiler traces with, in place of a weight."""
    return isinstance(w, RTNQuantizedTensor) and type(w.qdata) not in (Tensor, nn.Parameter)


def _name_of(w: Tensor | None) -> str | None:
    """What a model calls `w`. `quantize_` and `load` write the name on it, as `fqn`; transformers and torchao do not, and then
    the outermost module that is running knows it."""
    name = getattr(w, "fqn", None)
    if name or not isinstance(w, RTNQuantizedTensor) or _is_traced(w) or w.qdata.is_meta:
        return name
    address = w.qdata.data_ptr()
    for frame in _callers():
        if isinstance(model := frame.f_locals.get("self"), nn.Module):
            for fqn, p in model.named_parameters():
                if isinstance(p, RTNQuantizedTensor) and 0 <= address - p.qdata.data_ptr() < max(p.qdata.nbytes, 1):
                    name = fqn
    return name


# Dynamo leaves to eager code what is not implemented for its fake tensors, so that a misuse raises the same there; other errors it wraps.
_WHILE_TRACING = {kind: type(kind.__name__, (kind, NotImplementedError), {}) for kind in (ValueError, TypeError, IndexError)}


def _error(w: Tensor | None, what: str, kind: type[Exception] = ValueError) -> Exception:
    """An error that names the weight."""
    name = _name_of(w)
    return (_WHILE_TRACING.get(kind, kind) if _is_traced(w) else kind)(f"{name}: {what}" if name else what)


def _or_float(w: Tensor) -> str:
    """What to do where a model does with the weight `w` what no quantized one can do: MobileBERT joins two of different columns."""
    name = _name_of(w)
    return f"; a weight that its model uses so stays float by the rule ({name!r}, None)" if name else ""


# Those who compute anew from a weight what is to lie in one: PEFT where it merges an adapter, or takes it out again, and gives the result
# to `weight.data` (an error would come after the adapter is trained, too late); and transformers where new tokens get the others' mean.
_COMPUTES_ANEW = {
    "peft.": ("merge", "unmerge"),
    "transformers.": ("_init_added_embeddings_weights_with_mean", "_init_added_lm_head_weights_with_mean"),
}


def _is_computed_anew() -> bool:
    """Whether one of those computes with the weight. Nothing but the stack tells."""
    return any(
        frame.f_code.co_name in names and frame.f_globals.get("__name__", "").startswith(package)
        for frame in _callers()
        for package, names in _COMPUTES_ANEW.items()
    )


def hung_on(w: Tensor) -> dict[str, Any]:
    """What users hung on `w`: vLLM's weight_loader, say."""
    return {name: value for name, value in vars(w).items() if name not in _OWN}


def _as_parameter(cls: type[RTNQuantizedTensor], tensor: Tensor, attributes: dict[str, Any]) -> Tensor:
    """`tensor` as a parameter with what is hung on `attributes`, quantized in the format that they give if it is a float tensor."""
    if not isinstance(tensor, cls):
        if not isinstance(tensor, Tensor) or "bits" not in attributes:
            got = f"a float tensor of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
            raise TypeError(
                f"{cls.__name__}({got}) names no format; use {cls.__name__}.from_float(tensor, bits, group_size), or copy_ the tensor into "
                "the quantized weight, which keeps its format"
            )
        format = {name: attributes[name] for name in ("bits", "group_size", "scale_method") if name in attributes}
        turned = attributes.get("transposed", False)
        tensor = cls.from_float(tensor.mT if turned else tensor, **format)
        tensor = tensor.mT if turned else tensor
    new = nn.Parameter(tensor, requires_grad=False)
    vars(new).update((name, value) for name, value in attributes.items() if name not in _OWN)
    return new


def rebuilt(w: RTNQuantizedTensor, qdata: Tensor, scale: Tensor, **changed: Any) -> RTNQuantizedTensor:
    """A tensor of `w`'s format over other planes; what users hung on `w` goes along."""
    attributes = {name: getattr(w, name) for name in w.tensor_attribute_names} | changed
    # torch refuses an inference tensor as a view of one that is none, which `w.t()` would be in inference mode.
    with torch.inference_mode(w.is_inference()):
        new = type(w)(qdata, scale, **attributes)
    vars(new).update(hung_on(w))
    if w._shares_scale and _torch.is_alias_of(scale, w.scale):  # a copy has a scale of its own
        new._shares_scale = True
    return new


def _new_planes(factory, shape: Sequence[int], bits: int, group_size: int, dtype: torch.dtype, **kwargs) -> tuple[Tensor, Tensor]:
    *rows, k = shape
    qdata = factory((*rows, FORMATS[bits].row_bytes(k)), dtype=torch.uint8, **kwargs)
    return qdata, factory((*rows, groups(k, group_size)), dtype=dtype, **kwargs)


def _contiguous(shape: Sequence[int]) -> list[int]:
    """The strides of a contiguous tensor, as torch has them for sizes of 0, too."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        strides[i - 1] = strides[i] * max(shape[i], 1)
    return strides


def _layout(qdata: Tensor, bits: int, in_features: int, transposed: bool) -> tuple[list[int], list[int], Any]:
    """The size, strides and storage offset that a tensor over `qdata` shows, from which `as_strided` finds the planes again.

    A compiled function gives back a view of its input as nothing but these three numbers. They are those of the plain weight, unless
    in_features is padded: then the padding counts in the offset, and in the strides of what is not contiguous.
    """
    shape, strides, elements = [*qdata.shape[:-1], in_features], list(qdata.stride()), FORMATS[bits].elements_per_byte
    if strides == _contiguous(qdata.shape):
        strides = _contiguous(shape)
    else:
        strides = [*(stride * elements for stride in strides[:-1]), strides[-1]]
    if transposed:
        shape[-2:], strides[-2:] = shape[:-3:-1], strides[:-3:-1]
    return shape, strides, qdata.storage_offset() * elements


def _padded(plane: Tensor, rows: int) -> Tensor:
    """`plane` with zeros after it, up to `rows`; they lie there already where FSDP2 made it."""
    if len(plane) == rows:
        return plane
    size, stride, start = (rows, *plane.shape[1:]), plane.stride(), plane.storage_offset()
    end = (start + rows * stride[0]) * plane.itemsize
    if plane.is_contiguous() and end <= plane.untyped_storage().nbytes():
        return plane.as_strided(size, stride, start)
    return torch.cat([plane, plane.new_zeros(rows - len(plane), *plane.shape[1:])])


def _plane_dim(w: RTNQuantizedTensor, dim: int) -> int:
    """The planes' dim for the tensor's `dim`; the last one is packed."""
    if not -w.dim() <= dim < w.dim():
        raise IndexError(f"dim {dim} is out of range for a tensor of {w.dim()} dims")
    dim %= w.dim()
    return 2 * w.dim() - 3 - dim if w.transposed and dim >= w.dim() - 2 else dim


def _is_packed(w: RTNQuantizedTensor, dim: int) -> bool:
    return _plane_dim(w, dim) == w.dim() - 1


# ------------------------------------------------------------------------------------------- products


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for where `x` is, None where it is off."""
    device = x.device.type
    # torch refuses the question for meta.
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def _cast_by_autocast(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`t` in the dtype that autocast asks for, if it does; like torch's own it leaves float64, integers and complex numbers alone."""
    return t.to(dtype) if dtype and t.is_floating_point() and t.dtype is not torch.float64 else t


def _check_operand(x: Tensor, w: RTNQuantizedTensor, size: int) -> Tensor:
    """`x` as the kernel takes it: cast under autocast, else of the weight's dtype; its last dim is contracted with `size`."""
    if isinstance(x, RTNQuantizedTensor):
        raise _error(w, "a quantized tensor cannot multiply a quantized tensor; call .dequantize() on the activation", TypeError)
    if x.layout is not torch.strided or x.is_nested:
        _check_kind("x", x, w)
    _check_device("x", x, w)
    autocast = _autocast_dtype(x)
    if autocast:
        x = _cast_by_autocast(x, autocast)
    if x.dtype != (dtype := w.scale.dtype) and x.dtype != autocast:
        _check_kind("x", x, w)
        other = f" or weight.to({x.dtype})" if x.dtype in FLOAT_DTYPES else ""
        raise _error(w, f"x is {x.dtype} but the weight is {dtype}; use x.to({dtype}){other}", TypeError)
    if not x.dim() or x.shape[-1] != size:
        raise _error(w, f"x of shape {tuple(x.shape)} does not fit a weight of shape {tuple(w.shape)}: its last dim must be {size}")
    return x


def _check_kind(what: str, t: Tensor, w: RTNQuantizedTensor) -> None:
    """Raises TypeError for a tensor that is not dense, unless it is nested by a class of its own, whose values are."""
    if (why := registration.unfit(t)) and t.layout is not torch.jagged:
        raise _error(w, f"{what} is {why}", TypeError)
    if t.is_complex():
        raise _error(w, f"{what} is {t.dtype}, but a weight stands for real numbers; use it on {what}.real and {what}.imag", TypeError)


def _check_device(what: str, t: Tensor, w: RTNQuantizedTensor) -> None:
    device = w.qdata.device  # 0.2 us; the weight's own goes through the dispatcher, and takes 1.9
    if t.device != device:
        if t.is_meta:
            raise _error(w, f"{what} is on meta, where tensors have no numbers, but the weight is on {device}; make {what} on {device}")
        if device.type == "meta":
            raise _error(w, f"the weight is on meta, where tensors have no numbers, but {what} is on {t.device}; load the weight first")
        raise _error(w, f"{what} is on {t.device} but the weight is on {device}; use {what}.to('{device}') or weight.to('{t.device}')")


def _check_bias(bias: Tensor, x: Tensor, w: RTNQuantizedTensor) -> Tensor:
    """`bias` in the dtype of `x`, which `_check_operand` has seen: cast under autocast, else refused if it is another."""
    _check_device("bias", bias, w)
    if bias.dtype != x.dtype:
        _check_kind("bias", bias, w)
        bias = _cast_by_autocast(bias, _autocast_dtype(x))
        if bias.dtype != x.dtype:
            raise _error(w, f"bias is {bias.dtype} but x is {x.dtype}; use bias.to({x.dtype})", TypeError)
    return bias


def _check_indices(what: str, t: Tensor, w: RTNQuantizedTensor) -> None:
    """Raises unless `t` holds int32 or int64 numbers where the weight lies."""
    if not isinstance(t, Tensor):
        raise _error(w, f"{what} is a {type(t).__name__}; give a tensor of torch.int64 or torch.int32", TypeError)
    _check_kind(what, t, w)
    if t.dtype not in (torch.int64, torch.int32):
        raise _error(w, f"{what} is {t.dtype}; it must be torch.int64 or torch.int32", TypeError)
    _check_device(what, t, w)


def _project(x: Tensor, w: RTNQuantizedTensor, bias: Tensor | None, over_in_features: bool) -> Tensor:
    """x @ w'^T + bias where `over_in_features`, else x @ w' + bias, with w' `[N, K]` as the planes hold it."""
    qdata, scale = w.qdata, w.scale
    if qdata.dim() != 2:
        raise _error(w, f"linear needs a 2-D weight, got shape {tuple(w.shape)}; for experts use bmm or grouped_mm, or select one")
    x = _check_operand(x, w, w.in_features if over_in_features else qdata.shape[0])
    if bias is not None:
        bias = _check_bias(bias, x, w)
    if over_in_features:
        # Only a bias [N] is fused: addmm may bring one of another shape.
        fused = bias if bias is not None and bias.shape == (qdata.shape[0],) else None
        y = ops.linear(x, qdata, scale, fused, w.bits, w.group_size)
        return y if bias is None or fused is bias else _plus(y, bias, w)
    y = ops.linear_dx(x, qdata, scale, w.bits, w.group_size, w.in_features)
    return y if bias is None else _plus(y, bias, w)


def _plus(y: Tensor, bias: Tensor, w: RTNQuantizedTensor) -> Tensor:
    """The product `y` and `bias`, which `_check_bias` has seen."""
    fits = bias.dim() <= y.dim() and all(b in (1, n) for b, n in zip(reversed(bias.shape), reversed(y.shape), strict=False))
    if not fits:
        raise _error(w, f"bias of shape {tuple(bias.shape)} does not fit a product of shape {tuple(y.shape)}; it must be [{y.shape[-1]}]")
    return y + bias


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, RTNQuantizedTensor):
        raise TypeError(f"only the weight of a linear can be quantized; got input {input!r}: call .dequantize() on it")
    return _project(input, weight, bias, not weight.transposed)


def _matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(b, RTNQuantizedTensor):
        if b.dim() == 3:
            return _bmm(a, b)
        return _project(a, b, bias, b.transposed)
    assert isinstance(a, RTNQuantizedTensor)
    if a.dim() == 3:
        return _bmm(b.mT, a.mT).mT
    if bias is not None:  # a @ b + bias, with the weight first
        y = _matmul(a, b)
        return _plus(y, _check_bias(bias, y, a), a)
    if b.dim() == 1:
        return _project(b, a, None, not a.transposed)
    return _project(b.mT, a, None, not a.transposed).mT


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta == 1 and alpha == 1:
        return _matmul(mat1, mat2, input)
    y = _matmul(mat1, mat2)
    w = mat1 if isinstance(mat1, RTNQuantizedTensor) else mat2
    assert isinstance(w, RTNQuantizedTensor)
    return alpha * y if beta == 0 else _plus(alpha * y, beta * _check_bias(input, y, w), w)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    if isinstance(a, RTNQuantizedTensor):
        return _bmm(b.mT, a.mT).mT
    assert isinstance(b, RTNQuantizedTensor)
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0]:
        raise _error(b, f"bmm needs x [E, M, K] and a weight of E experts, got shapes {tuple(a.shape)} and {tuple(b.shape)}")
    experts, m = a.shape[:2]
    offs = torch.arange(1, experts + 1, dtype=torch.int32, device=a.device) * m
    return _grouped_mm(a.flatten(0, 1), b, offs).unflatten(0, (experts, m))


def _grouped_mm(
    mat_a: Tensor, mat_b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    a, b = mat_a, mat_b
    if not isinstance(b, RTNQuantizedTensor) or b.dim() != 3 or a.dim() != 2 or offs is None:
        raise _error(
            b, f"grouped_mm needs x [M, K], a quantized weight [E, K, N] and offs [E]; got shapes {tuple(a.shape)}, {tuple(b.shape)}"
        )
    a = _check_operand(a, b, b.shape[-2])
    _check_indices("offs", offs, b)
    if b.transposed:
        y = ops.grouped(a, b.qdata, b.scale, offs, b.bits, b.group_size)
    else:
        y = ops.grouped_dx(a, b.qdata, b.scale, offs, b.bits, b.group_size, b.in_features)
    if bias is not None:
        y = _plus(y, _check_bias(bias, y, b), b)
    return y if out_dtype is None else y.to(out_dtype)


def _embedding(
    input: Tensor,
    weight: RTNQuantizedTensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None:
        raise _error(weight, "embedding with max_norm rewrites the weight, which a quantized one cannot; drop max_norm")
    if weight.transposed or weight.dim() != 2:
        raise _error(weight, f"embedding needs a 2-D weight that is not transposed, got {weight!r}")
    _check_indices("input", input, weight)
    rows = weight.qdata.shape[0]
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise _error(weight, f"padding_idx={padding_idx} is out of range: the weight has {rows} rows")
    try:
        return ops.embedding(input, weight.qdata, weight.scale, weight.bits, weight.group_size, weight.in_features)
    except IndexError as error:
        raise _error(weight, str(error), IndexError) from None


def _into(out: Tensor | None, product: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """What `product` gives, written into `out` where there is one."""
    if isinstance(out, RTNQuantizedTensor):
        raise _error(
            out, "a product cannot be written into a quantized tensor by out=; copy_ it into the tensor, which quantizes", TypeError
        )
    y = product(*args, **kwargs)
    if out is None:
        return y
    if out.dtype != y.dtype or (out.shape != y.shape and out.numel()):
        raise ValueError(f"out is {out.dtype} of shape {tuple(out.shape)}, but the product is {y.dtype} of shape {tuple(y.shape)}")
    return out.resize_(y.shape).copy_(y)


# Caught here, above autograd and autocast: one op with its own backward, the weight's scale never cast, and 3 us a call.
for _torch_fns, _handler in (
    ([F.linear], _linear),
    ([torch.mm, Tensor.mm], lambda input, mat2, *, out=None: _into(out, _matmul, input, mat2)),
    ([torch.matmul, Tensor.matmul, Tensor.__matmul__], lambda input, other, *, out=None: _into(out, _matmul, input, other)),
    ([Tensor.__rmatmul__], lambda other, input: _matmul(input, other)),
    ([torch.addmm, Tensor.addmm], lambda *args, out=None, **kwargs: _into(out, _addmm, *args, **kwargs)),
    ([torch.bmm, Tensor.bmm], lambda input, mat2, *, out=None: _into(out, _bmm, input, mat2)),
    ([_torch.old_grouped_mm, F.grouped_mm], _grouped_mm),
    ([F.embedding], _embedding),
):

    @_function(_torch_fns)
    def _(func, types, args, kwargs, _handler=_handler):
        return _handler(*args, **(kwargs or {}))


@_function(torch.einsum)
def _(func, types, args, kwargs):
    """torch takes it apart, and what comes of that may be a product of ours."""
    try:
        with _torch.without_overrides():
            return func(*args, **(kwargs or {}))
    except (ValueError, NotImplementedError) as error:
        w = next(t for t in tree_leaves(args) if isinstance(t, RTNQuantizedTensor))
        raise _error(
            w,
            f"einsum({args[0]!r}) comes to more than a product with the weight; use F.linear(x, weight) or x @ weight, or give einsum "
            "weight.dequantize()",
            NotImplementedError,
        ) from error


# The same below autograd, where DTensor and C++ callers arrive.
for _aten_op, _handler in (
    (aten.linear.default, _linear),
    (aten.mm.default, _matmul),
    (aten.matmul.default, _matmul),
    (aten.addmm.default, _addmm),
    (aten.bmm.default, _bmm),
    (aten._grouped_mm.default, _grouped_mm),
    (aten.embedding.default, lambda weight, indices, *args: _embedding(indices, weight)),
):

    @_op(_aten_op)
    def _(func, types, args, kwargs, _handler=_handler):
        return _handler(*args, **kwargs)


# ------------------------------------------------------------------------------------------- views


def _slice(w: RTNQuantizedTensor, dim: int, start: Any, end: Any, step: int = 1) -> RTNQuantizedTensor:
    size = w.shape[dim]
    start, end, _ = slice(start, end).indices(size)
    dim = _plane_dim(w, dim)
    if dim < w.qdata.dim() - 1:
        return rebuilt(w, *(aten.slice.Tensor(p, dim, start, end, step) for p in (w.qdata, w.scale)))
    k = max(end - start, 0)
    fmt = FORMATS[w.bits]
    unit = fmt.chunk if w.group_size == -1 else w.group_size
    if k and (step != 1 or start % unit or (end % unit and end != size)):
        raise _error(
            w,
            f"cannot slice columns {start}:{end}{f':{step}' if step != 1 else ''}; with bits={w.bits} and group_size={w.group_size} "
            f"cuts must be multiples of {unit}, or at the end, {size}",
        )
    start = start if k else 0
    qdata = w.qdata.narrow(dim, fmt.row_bytes(start), fmt.row_bytes(k))
    scale = w.scale if w.group_size == -1 else w.scale.narrow(dim, groups(start, unit), groups(k, unit))
    out = rebuilt(w, qdata, scale.view(scale.shape), in_features=k)
    if w.group_size == -1 and k < size:
        out._shares_scale = True
    return out


@_op(aten.slice.Tensor)
def _(func, types, args, kwargs):
    w, dim, start, end, step = [*args, *(None, 0, None, None, 1)[len(args) :]]
    return return_and_correct_aliasing(func, args, kwargs, _slice(w, dim, start, end, step))


@_op([aten.split.Tensor, aten.split_with_sizes.default])
def _(func, types, args, kwargs):
    w, sizes = args[:2]
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    total = w.shape[dim]
    if isinstance(sizes, int | torch.SymInt):
        sizes = [min(sizes, total - i * sizes) for i in range(-(-total // sizes))] if total else [0]
    elif sum(sizes) != total:
        raise _error(w, f"split sizes {list(sizes)} do not add up to {total}, the size of dim {dim}")
    parts, start = [], 0
    for size in sizes:
        parts.append(_slice(w, dim, start, start + size))
        start += size
    return return_and_correct_aliasing(func, args, kwargs, parts)


def _select(w: RTNQuantizedTensor, dim: int, index: int) -> RTNQuantizedTensor:
    plane_dim = _plane_dim(w, dim)
    if plane_dim == w.dim() - 1:
        raise _error(w, f"cannot select along dim {dim}: one column of a packed weight is no tensor; slice whole groups, or dequantize()")
    # Without its rows a weight has no two dims to stand swapped.
    transposed = w.transposed and plane_dim != w.dim() - 2
    return rebuilt(w, *(aten.select.int(p, plane_dim, index) for p in (w.qdata, w.scale)), transposed=transposed)


@_op(aten.select.int)
def _(func, types, args, kwargs):
    return return_and_correct_aliasing(func, args, kwargs, _select(*args))


@_op(aten.unbind.int)
def _(func, types, args, kwargs):
    w, dim = [*args, 0][:2]
    return return_and_correct_aliasing(func, args, kwargs, [_select(w, dim, i) for i in range(w.shape[dim])])


def _called_by(*packages: str) -> bool:
    """Whether a module of one of `packages` called the op that is being handled."""
    modules = (frame.f_globals.get("__name__", "") for frame in _callers())
    return next((name for name in modules if name.partition(".")[0] not in ("rtn_tensor", "torchao")), "").startswith(packages)


@_op([aten.view.default, aten._unsafe_view.default, aten.reshape.default])
def _(func, types, args, kwargs):
    w, size = args[0], list(args[1])
    # FSDP2 and DistributedDataParallel flatten a weight whole and only ever make views of it again: the tensor with its shape kept serves.
    flat = size == [-1] and _called_by("torch.distributed.", "torch.nn.parallel.")
    if -1 in size and not flat:
        known = -math.prod(size)
        size[size.index(-1)] = w.numel() // known if known else 0
    same_shape = flat or size == list(w.shape)
    if not same_shape and (w.transposed or not size or size[-1] != w.in_features or math.prod(size) != w.numel()):
        raise _error(
            w, f"cannot view shape {tuple(w.shape)} as {tuple(args[1])}; a view keeps the packed last dim, in_features={w.in_features}"
        )
    if same_shape:
        out = rebuilt(w, *(p.view(p.shape) for p in (w.qdata, w.scale)))
        out._is_flat = flat
    else:
        out = rebuilt(w, *(func(p, [*size[:-1], p.shape[-1]]) for p in (w.qdata, w.scale)))
    return return_and_correct_aliasing(func, args, kwargs, out)


def _as_strided(w: RTNQuantizedTensor, size: list[Any], stride: list[Any], offset: Any) -> RTNQuantizedTensor | None:
    """The part of `w` that `_layout` shows with these numbers, None where there is none."""
    if not size or len(size) != len(stride) or offset < 0:
        return None
    # A compiler may hold these as symbols.
    transposed = bool(len(size) > 1 and stride[-2] == 1 and (stride[-1] != 1 or size[-1] != 1 or (size[-2] == 1 and w.transposed)))
    if transposed:
        size, stride = [*size[:-2], *size[:-3:-1]], [*stride[:-2], *stride[:-3:-1]]
    fmt, k = FORMATS[w.bits], size[-1]
    elements = fmt.elements_per_byte
    if stride == _contiguous(size):
        strides, uneven = _contiguous([*size[:-1], fmt.row_bytes(k)]), []
    else:
        strides, uneven = [*(s // elements for s in stride[:-1]), stride[-1]], [s % elements for s in stride[:-1]]
    # The smallest step from row to row of `w`, in each plane; every other one must be a multiple, and the same multiple in both.
    steps = [(q, s, n) for n, q, s in zip(w.qdata.shape[:-1], w.qdata.stride(), w.scale.stride(), strict=False) if n > 1 and q]
    row, scale_row, _ = min(steps, default=(0, 0, 1))
    shift = offset // elements - w.qdata.storage_offset()
    first = shift // row if row else 0
    column = (shift - first * row) * elements
    unit = fmt.chunk if w.group_size == -1 else w.group_size
    wanted = [(n, s) for n, s in zip(size[:-1], strides, strict=False) if n > 1]
    last = first * row + sum((n - 1) * s for n, s in wanted)
    whole = stride[-1] == 1 and offset % elements == 0 and not any(uneven)
    alike = all(q * scale_row == s * row for q, s, _ in steps)
    rows_lie_in_w = all(s % row == 0 if row else s == 0 for _, s in wanted) and 0 <= first and last <= sum((n - 1) * q for q, _, n in steps)
    columns_lie_in_w = 0 <= column <= w.in_features - k and column % unit == 0 and (k % unit == 0 or column + k == w.in_features)
    if not (whole and alike and (rows_lie_in_w or 0 in size) and columns_lie_in_w):
        return None
    scale_strides = [*(s // row * scale_row if row else 0 for s in strides[:-1]), w.scale.stride(-1)]
    scale_column = 0 if w.group_size == -1 else column // unit
    qdata = w.qdata.as_strided([*size[:-1], fmt.row_bytes(k)], strides, offset // elements)
    scale = w.scale.as_strided(
        [*size[:-1], groups(k, w.group_size)],
        scale_strides,
        w.scale.storage_offset() + first * scale_row + scale_column * w.scale.stride(-1),
    )
    out = rebuilt(w, qdata, scale, in_features=k, transposed=transposed)
    if w.group_size == -1 and k < w.in_features:
        out._shares_scale = True
    return out


@_op(aten.as_strided.default)
def _(func, types, args, kwargs):
    w, size, stride = args[0], list(args[1]), list(args[2])
    offset = args[3] if len(args) > 3 else kwargs.get("storage_offset")
    out = _as_strided(w, size, stride, w.storage_offset() if offset is None else offset)
    if out is None:
        raise _error(
            w,
            f"as_strided gives rows and whole groups of columns that lie in {w!r}, not size {size}, stride {stride} and offset {offset}; "
            "use slices, or dequantize()",
        )
    return return_and_correct_aliasing(func, args, kwargs, out)


@_function([Tensor.as_strided, torch.as_strided])
def _(func, types, args, kwargs):
    """What a compiled function gives back comes through here. As a view in autograd's eyes (a weight has no gradient) it would be made
    anew, under symbolic shapes, from symbols that torch has no guard for."""
    with _torch.below_autograd(), _torch.without_overrides():
        return func(*args, **kwargs)


@_op(aten.unsqueeze.default)
def _(func, types, args, kwargs):
    w, dim = args
    plane_dim = dim % (w.dim() + 1)
    if plane_dim > w.dim() - (2 if w.transposed else 1):
        raise _error(
            w, f"cannot unsqueeze at dim {dim}: the last {2 if w.transposed else 1} dim(s) of {tuple(w.shape)} must stay last{_or_float(w)}"
        )
    return return_and_correct_aliasing(func, args, kwargs, rebuilt(w, *(func(p, plane_dim) for p in (w.qdata, w.scale))))


@_op([aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims])
def _(func, types, args, kwargs):
    w = args[0]
    dims = range(w.dim()) if len(args) == 1 else [args[1]] if isinstance(args[1], int) else args[1]
    leading = w.dim() - (2 if w.transposed else 1)
    squeezed = [d % w.dim() for d in dims if w.shape[d] == 1]
    if any(d >= leading for d in squeezed):
        raise _error(w, f"cannot squeeze dim(s) {squeezed} of shape {tuple(w.shape)}: only the first {leading} dim(s) may go")
    planes = (aten.squeeze.dims(p, squeezed) for p in (w.qdata, w.scale))
    return return_and_correct_aliasing(func, args, kwargs, rebuilt(w, *planes))


def _permute(w: RTNQuantizedTensor, order: Sequence[int]) -> RTNQuantizedTensor:
    plane_order = [_plane_dim(w, d) for d in order]
    last = w.dim() - 1
    if last > 0 and set(plane_order[-2:]) == {last - 1, last}:
        transposed = plane_order[-1] != last
        plane_order[-2:] = [last - 1, last]
    elif plane_order[-1] == last and not w.transposed:
        transposed = False
    else:
        raise _error(w, f"cannot permute {tuple(w.shape)} to {tuple(order)}: the last two dims may swap, and the others among themselves")
    return rebuilt(w, *(aten.permute.default(p, plane_order) for p in (w.qdata, w.scale)), transposed=transposed)


@_op([aten.t.default, aten.transpose.int, aten.permute.default])
def _(func, types, args, kwargs):
    w = args[0]
    order = list(range(w.dim()))
    if func is aten.permute.default:
        order = args[1]
    elif w.dim() > 1:
        a, b = (0, 1) if func is aten.t.default else args[1:3]
        order[a], order[b] = order[b], order[a]
    return return_and_correct_aliasing(func, args, kwargs, _permute(w, order))


@_function([Tensor.mT.__get__, Tensor.mH.__get__])  # type: ignore[attr-defined]
def _(func, types, args, kwargs):
    """As a method: in a frame that Dynamo gave up, torchao's dispatcher is a graph of its own, which asks for a property without end."""
    return args[0].transpose(-2, -1)


@_function([Tensor.T.__get__, Tensor.H.__get__])  # type: ignore[attr-defined]
def _(func, types, args, kwargs):
    if args[0].dim() == 2:
        return args[0].t()
    with _torch.without_overrides():
        return func(*args)


@_op(aten.expand.default)
def _(func, types, args, kwargs):
    w, size = args[0], list(args[1])
    if size[-2:] not in ([-1, -1], list(w.shape[-2:])):
        raise _error(w, f"cannot expand {tuple(w.shape)} to {tuple(size)}: the last two dims must stay as they are")
    # vmap over a weight asks for it
    return return_and_correct_aliasing(func, args, kwargs, rebuilt(w, *(func(p, [*size[:-2], -1, -1]) for p in (w.qdata, w.scale))))


@_op(aten.index.Tensor)
def _(func, types, args, kwargs):
    w, indices = args
    covered = sum(1 if i is None or i.dtype not in (torch.bool, torch.uint8) else i.dim() for i in indices)
    free = w.dim() - (2 if w.transposed else 1)
    if covered > free:
        raise _error(w, f"cannot index {covered} dim(s) of shape {tuple(w.shape)} by tensors: only the first {free} can be{_or_float(w)}")
    return rebuilt(w, *(func(p, indices) for p in (w.qdata, w.scale)))


@_op(aten.index_select.default)
def _(func, types, args, kwargs):
    w, dim, index = args
    if _is_packed(w, dim):
        raise _error(w, f"cannot index_select along dim {dim} of {tuple(w.shape)}: it is packed; dequantize() first")
    return rebuilt(w, *(func(p, _plane_dim(w, dim), index) for p in (w.qdata, w.scale)))


@_op([aten.cat.default, aten.stack.default])
def _(func, types, args, kwargs):
    tensors = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    first = next(t for t in tensors if isinstance(t, RTNQuantizedTensor))
    name = "stack" if func is aten.stack.default else "cat"
    for t in tensors:
        if not isinstance(t, RTNQuantizedTensor) or _format(t) != _format(first):
            other = repr(t) if isinstance(t, RTNQuantizedTensor) else f"a plain {t.dtype} tensor of shape {tuple(t.shape)}"
            raise _error(first, f"cannot {name} {first!r} with {other}: format and dtype must be the same{_or_float(first)}", TypeError)
    if func is aten.stack.default:
        plane_dim = dim % (first.dim() + 1)
        if plane_dim > first.dim() - (2 if first.transposed else 1):
            raise _error(first, f"cannot stack along dim {dim}: the packed dims of {tuple(first.shape)} must stay last{_or_float(first)}")
        in_features = first.in_features
        same = [t.in_features == in_features for t in tensors]
    elif _is_packed(first, dim):
        plane_dim = first.dim() - 1
        unit = first.group_size
        if unit == -1:
            raise _error(first, "cannot cat along in_features with group_size=-1: every part has a scale of its own; dequantize() first")
        if bad := [t.in_features for t in tensors[:-1] if t.in_features % unit]:
            raise _error(first, f"cannot cat parts of {bad[0]} columns; all but the last must be multiples of group_size={unit}")
        in_features = sum(t.in_features for t in tensors)
        same = [True]
    else:
        plane_dim = _plane_dim(first, dim)
        in_features = first.in_features
        same = [t.in_features == in_features for t in tensors]
    if not all(same):
        raise _error(
            first, f"cannot {name} weights of in_features {[t.in_features for t in tensors]} along dim {dim}; they must be the same"
        )
    planes = (func([getattr(t, plane) for t in tensors], plane_dim) for plane in first.tensor_data_names)
    return rebuilt(first, *planes, in_features=in_features)


# ------------------------------------------------------------------------------------------- copies


def _format(w: RTNQuantizedTensor) -> tuple:
    return w.bits, w.group_size, w.scale_method, w.transposed, w.scale.dtype


@_op([aten.detach.default, aten.alias.default, aten.clone.default])
def _(func, types, args, kwargs):
    w = args[0]
    # Planes are always laid out row by row, whatever memory format is asked for.
    planes = (func(p) for p in (w.qdata, w.scale))
    out = rebuilt(w, *planes)
    return out if func is aten.clone.default else return_and_correct_aliasing(func, args, kwargs, out)


@_function(Tensor.contiguous)
def _(func, types, args, kwargs):
    w = args[0]
    return w if w.qdata.is_contiguous() and w.scale.is_contiguous() else rebuilt(w, w.qdata.contiguous(), w.scale.contiguous())


def _convert_scale(w: RTNQuantizedTensor, dtype: torch.dtype) -> Tensor:
    _check_dtype(dtype, w)
    if dtype == w.scale.dtype:
        return w.scale
    if not _torch.tracing(w.scale) and not (w.scale.float().abs().nan_to_num(0.0) <= torch.finfo(dtype).max).all():
        raise _error(w, f"a scale of {w.scale.abs().max().item():.3g} overflows {dtype}; keep {w.scale.dtype}, or use torch.bfloat16")
    return round_scale(w.scale.float(), dtype)


@_op(aten.dequantize.self)
def _(func, types, args, kwargs):
    return args[0].dequantize()


@_op(aten._to_copy.default)
def _(func, types, args, kwargs):
    w = args[0]
    to = {k: v for k, v in kwargs.items() if k in ("device", "non_blocking", "pin_memory")}
    scale = _convert_scale(w, kwargs.get("dtype") or w.scale.dtype)
    return rebuilt(w, func(w.qdata, **to), func(scale, **to))


@_op(aten.copy_.default)
def _(func, types, args, kwargs):
    dst, src = args[:2]
    if src.is_nested:
        raise _error(dst, f"the tensor to copy is {registration.unfit(src)}", TypeError)
    if dst.shape != src.shape:
        raise _error(dst, f"cannot copy_ a tensor of shape {tuple(src.shape)} into one of shape {tuple(dst.shape)}")
    if not isinstance(dst, RTNQuantizedTensor):
        return dst.copy_(src.dequantize(dst.dtype if dst.dtype in FLOAT_DTYPES else None))
    if dst._shares_scale:
        raise _error(
            dst, "cannot copy_ into some columns of a weight with group_size=-1: its other columns share the scale; copy whole rows"
        )
    if isinstance(src, RTNQuantizedTensor):
        if (dst.bits, dst.group_size, dst.transposed) != (src.bits, src.group_size, src.transposed):
            raise _error(
                dst, f"cannot copy_ {src!r} into {dst!r}: the formats differ; copy_ from src.dequantize() to requantize", TypeError
            )
        scale = _convert_scale(src, dst.scale.dtype)
        dst.qdata.copy_(src.qdata)
        dst.scale.copy_(scale)
    else:
        if why := registration.unfit(src):
            raise _error(dst, f"the tensor to copy is {why}", TypeError)
        if src.is_meta and not dst.qdata.is_meta:
            raise _error(
                dst, f"cannot copy_ a tensor on meta, where tensors have no numbers, into one on {dst.qdata.device}; make it there"
            )
        if src.is_neg() or src._is_zerotensor():  # below autograd nothing else than copy_ looks at what a tensor is a view of
            src = torch.empty(src.shape, dtype=src.dtype, device=src.device).copy_(src)
        w = src.to(dst.qdata.device)
        _check_dtype(w.dtype, dst)
        ops.quantize_(w.mT if dst.transposed else w, dst.qdata, dst.scale, dst.bits, dst.group_size, dst.scale_method)
    return dst


@_op(
    [
        *(aten.add_.Tensor, aten.add_.Scalar, aten.sub_.Tensor, aten.sub_.Scalar),
        *(aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.div_.Scalar),
        *(aten.addmm_.default, aten.addcmul_.default, aten.addcdiv_.default),
    ]
)
def _(func, types, args, kwargs):
    """In place, as where PEFT merges: the result is quantized as `copy_` does; of a number only the scale is a multiple."""
    w, *others = args
    name = func._schema.name.removeprefix("aten::")
    if isinstance(w, RTNQuantizedTensor) and w._shares_scale:
        raise _error(w, f"cannot {name} some columns of a weight with group_size=-1: its other columns share the scale; take whole rows")
    quantized = next((t for t in [*others, *kwargs.values()] if isinstance(t, RTNQuantizedTensor)), None)
    if quantized is not None:
        raise _error(
            quantized,
            f"{name} does not take a quantized operand; give it .dequantize(), a plain tensor (an average of quantized weights would be "
            "rounded anew at each step: average the float ones)",
            TypeError,
        )
    if name in ("mul_", "div_") and not isinstance(others[0], Tensor) and others[0] and not kwargs:
        w.scale.copy_(round_scale(func(w.scale.float(), others[0]), w.scale.dtype))
        return w
    before = w.dequantize()
    after = func(before.clone(), *others, **kwargs)
    fresh: Any = w.clone().copy_(after)
    # What is quantized twice is another number; so rows that stay as they are keep their bits, as where an optimizer adds zeros.
    changed = (after != before).any(-2 if w.transposed else -1)[..., None]
    w.qdata.copy_(torch.where(changed, fresh.qdata, w.qdata))
    w.scale.copy_(torch.where(changed, fresh.scale, w.scale))
    return w


@_op(aten.lerp_.Scalar)
def _(func, types, args, kwargs):
    w, end = args[:2]
    if not torch.equal(w, end):
        raise _error(
            w if isinstance(w, RTNQuantizedTensor) else end,
            "an average (lerp_) of quantized weights would be rounded anew at each step; average only what is trained, or a model after "
            "dequantize_(model)",
            NotImplementedError,
        )
    return w  # the average of a frozen weight with itself, as AveragedModel has it


@_op([aten._foreach_lerp_.Scalar, aten._foreach_copy_.default])
def _(func, types, args, kwargs):
    one = {aten._foreach_lerp_.Scalar: Tensor.lerp_, aten._foreach_copy_.default: Tensor.copy_}[func]
    for pair in zip(*args[:2], strict=True):
        one(*pair, *args[2:], **kwargs)


@_op(aten.full_like.default)
def _(func, types, args, kwargs):
    raise _error(
        args[0],
        "a quantized weight holds no one number everywhere; use torch.full_like(weight.dequantize(), value), and give an optimizer "
        "(Adagrad asks for it) only the parameters that require a gradient",
        NotImplementedError,
    )


@_op([aten.empty_like.default, aten.zeros_like.default, aten.new_empty.default, aten.new_zeros.default])
def _(func, types, args, kwargs):
    w = args[0]
    shape = list(args[1]) if len(args) > 1 else list(w.shape)
    if w.transposed:
        if len(shape) < 2:
            raise _error(w, f"cannot make a transposed tensor of shape {tuple(shape)}; it needs at least 2 dims")
        shape[-2:] = shape[:-3:-1]
    dtype = kwargs.get("dtype") or w.scale.dtype
    _check_dtype(dtype, w)
    to = {"device": kwargs.get("device") or w.qdata.device, "pin_memory": kwargs.get("pin_memory") or False}
    factory = torch.zeros if func in (aten.zeros_like.default, aten.new_zeros.default) else torch.empty
    planes = _new_planes(factory, shape, w.bits, w.group_size, dtype, **to)
    new = rebuilt(w, *planes, in_features=shape[-1])
    if func == aten.new_zeros.default:  # FSDP2 asks for a shard with its padding, and then for the part that is no padding
        new._padded_rows = shape[0]
    return new


@_op(aten.equal.default)
def _(func, types, args, kwargs):
    a, b = args
    if not (isinstance(a, RTNQuantizedTensor) and isinstance(b, RTNQuantizedTensor)):
        return False  # transformers asks it of a tied pair of which one is quantized
    return a.shape == b.shape and _format(a) == _format(b) and a.qdata.equal(b.qdata) and a.scale.equal(b.scale)


@_op(aten.is_pinned.default)
def _(func, types, args, kwargs):
    return args[0].qdata.is_pinned() and args[0].scale.is_pinned()


@_op(aten._pin_memory.default)
def _(func, types, args, kwargs):
    return rebuilt(args[0], args[0].qdata.pin_memory(), args[0].scale.pin_memory())


@_function(Tensor.data.__get__)  # type: ignore[attr-defined]
def _(func, types, args, kwargs):
    """As a method, for the reason that `mT` has."""
    return args[0].detach()


@_function(Tensor.data.__set__)  # type: ignore[attr-defined]
def _(func, types, args, kwargs):
    w, new = args
    if not isinstance(new, RTNQuantizedTensor):
        if new.shape != w.shape and (w.transposed or new.dim() != 2 or new.shape[1:] != w.shape[1:]):
            raise _error(
                w,
                f"cannot set .data to a tensor of shape {tuple(new.shape)}; the weight is {tuple(w.shape)}, and only the rows of a matrix "
                "may become more or fewer",
            )
        _check_dtype(new.dtype, w)
        # In planes of its own: who kept the old `.data` keeps what it held, as with a plain tensor.
        fresh = type(w).from_float(new.mT if w.transposed else new, w.bits, w.group_size, w.scale_method)
        if new.shape != w.shape:  # as transformers' resize_token_embeddings does: the rows that stay keep their bits
            rows = min(len(new), len(w))
            kept = (new[:rows] == w[:rows].dequantize(new.dtype)).all(-1).nonzero().flatten()
            fresh.qdata[kept], fresh.scale[kept] = w.qdata[kept], w.scale[kept].to(new.dtype)
        new = fresh.mT if w.transposed else fresh
    with _torch.without_overrides():
        func(w, new)  # size, strides, dtype and device
    for name in (*w.tensor_data_names, *w.tensor_attribute_names, "_shares_scale"):
        setattr(w, name, getattr(new, name))


@_function(_torch.can_set_data)
def _(func, types, args, kwargs):
    """`nn.Module.to` and the like ask this before they swap tensors, which they do whatever is said, and cannot do to a held one."""
    w, new = args
    if isinstance(w, RTNQuantizedTensor) and isinstance(new, RTNQuantizedTensor):
        weakly = bool(weakref.getweakrefs(w))
        if weakly or _torch.references(w) > 1:
            holder = "a weak reference (torch.export leaves one for good)" if weakly else "a view or a trace"
            raise _error(
                w,
                f"torch cannot convert or move {w!r} while {holder} holds it; let go of that first, or convert a copy "
                "(copy.deepcopy(model).to(...)), or set p.data = p.data.to(...) for each parameter p, and views keep the old numbers",
                RuntimeError,
            )
    return type(w) is type(new) and w.shape == new.shape


@_function(_torch.get_base)
def _(func, types, args, kwargs):
    with _torch.without_overrides():
        base = func(*args)
    if base is None and _called_by("torch._functorch._aot_autograd.runtime_wrappers"):
        # There it is asked for arguments that share memory, of which the graph writes one; without a base, torch gives up in a riddle.
        raise _error(
            args[0],
            f"a compiled graph has several views of one quantized weight as arguments ({args[0]!r} is one), and writes into one of them; "
            "take the slices in the graph itself (after a graph break, again), write outside of the compiled function, or put what writes "
            "into a function under torch.compiler.disable",
            RuntimeError,
        )
    return base


@_function(Tensor.share_memory_)
def _(func, types, args, kwargs):
    args[0].qdata.share_memory_()
    args[0].scale.share_memory_()
    return args[0]


@_function(Tensor.is_shared)
def _(func, types, args, kwargs):
    return args[0].qdata.is_shared() and args[0].scale.is_shared()


@_function(Tensor.data_ptr)
def _(func, types, args, kwargs):
    # accelerate and others tell tied weights by it, so it must be one of its own; and no address, where one would read floats.
    return -args[0].qdata.data_ptr()


@_function(Tensor.untyped_storage)
def _(func, types, args, kwargs):
    if not _called_by("torch."):  # which tells by it what shares memory; elsewhere `set_` would read at address 0
        args[0].storage()
    with _torch.without_overrides():
        return func(*args)


_to_dlpack = torch.utils.dlpack.to_dlpack


@functools.wraps(_to_dlpack)
def _to_dlpack_with_memory(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """torch's, which asks no class of tensors, and would give a capsule with address 0."""
    if isinstance(tensor, RTNQuantizedTensor):
        tensor.__dlpack__()
    return _to_dlpack(tensor, *args, **kwargs)


torch.utils.dlpack.to_dlpack = torch.to_dlpack = _to_dlpack_with_memory


@_function(torch.norm_except_dim)
def _(func, types, args, kwargs):
    # No NotImplementedError, which torch's parametrizations take for a weight that has no inverse, to fail in the forward.
    raise _error(
        args[0],
        "weight_norm would train a length and a direction of a quantized weight; leave the weight float, or dequantize()",
        TypeError,
    )


@_function([Tensor.numpy, Tensor.__array__, Tensor.tolist])
def _(func, types, args, kwargs):
    raise _error(
        args[0],
        "a quantized weight is no numpy array (accelerate asks for one to offload to disk: offload to the CPU, where it takes a fraction "
        "of the float weight); use .dequantize().numpy(), or .qdata and .scale",
        TypeError,
    )


@_op(aten.view.dtype)
def _(func, types, args, kwargs):
    raise _error(
        args[0],
        f"a quantized weight has no elements to view as {args[1]} (accelerate does so to offload to disk: offload to the CPU, where it "
        "takes a fraction of the float weight); view .dequantize(), or .qdata and .scale",
        TypeError,
    )


@_function([Tensor.requires_grad_, Tensor.requires_grad.__set__])  # type: ignore[attr-defined]
def _(func, types, args, kwargs):
    # Ignored, not refused: `nn.Parameter(w)` and `load_state_dict(assign=True)` ask for it of their own accord.
    w, wanted = [*args, *kwargs.values(), True][:2]
    if wanted and _called_by("peft."):
        warnings.warn(
            f"{getattr(w, 'fqn', repr(w))} is quantized and will not be trained (PEFT's modules_to_save){_or_float(w)}", stacklevel=4
        )
    return w
