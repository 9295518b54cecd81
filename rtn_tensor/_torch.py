"""Every private name of torch that this library uses, and why; no other module touches one
(`tests/test_private_names.py`).

A release of torch that moves one of them fails a test that names it.
"""

import functools
import operator
from typing import Any

import torch
from torch import Tensor

# torch's own in-place of an op's Python function runs with subclasses' overrides off; public is only the
# class that a `super()` call of `__torch_function__` enters by itself.
from torch._C import DisableTorchFunctionSubclass as without_overrides  # noqa: F401
from torch._C import _are_functorch_transforms_active as transform_is_active

# Autocast would redo the fp32 products inside a kernel in its own dtype; public
# `torch.autocast(enabled=False)` is for one kind of device.
from torch._C import _DisableAutocast as without_autocast  # noqa: F401

# Which dispatch keys a tensor has: there is no public question whether it is a plain one.
from torch._C import _dispatch_keys as dispatch_keys

# Whether torch.jit.trace is at work; `torch.jit.is_tracing` asks the same, and warns.
from torch._C import _get_tracing_state as tracing_state

# Whether two tensors share their memory; public is only the comparison of addresses, which a view has its own
# of.
from torch._C import _is_alias_of as is_alias_of  # type: ignore[attr-defined]  # noqa: F401
from torch._C import _is_any_autocast_enabled as autocast_is_enabled  # noqa: F401

# Whether overrides are on: torch copies and pickles with them off.
from torch._C import _is_torch_function_enabled as overrides_are_on  # noqa: F401

# Whether a TorchDispatchMode is at work: it has to see the ops.
from torch._C import _len_torch_dispatch_stack as modes_at_work
from torch._C._functorch import is_batchedtensor  # noqa: F401  (a sample of vmap)

# What Dynamo does with a function's frames; `torch.compiler.disable` would put another around each call.
from torch._dynamo.eval_frame import FrameAction, FrameExecStrategy, set_code_exec_strategy  # pyright: ignore[reportPrivateImportUsage]

# Has a function run as it stands where Dynamo would compile it by itself, and traced where what is compiled
# calls it; `torch.compiler.disable` would break the graph there.
from torch._dynamo.eval_frame import skip_code as never_compile_alone  # noqa: F401
from torch.autograd import forward_ad, grad_mode, profiler
from torch.compiler import is_compiling

# A mode that sees every op, as torch's documentation of subclasses has it.
# A wrapper subclass's own `__torch_dispatch__` gives back views that alias their base by it, as torch's
# documentation of subclasses does.
from torch.utils._python_dispatch import (
    TorchDispatchMode,  # noqa: F401
    return_and_correct_aliasing,  # noqa: F401
)
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: F401  (torch.utils.pytree has neither, torch 2.14)

# Writing what is there already is no change that a backward must hear of.
same_version = grad_mode._unsafe_preserve_version_counter

# How a tensor is made that shows a shape, strides and an offset, and has no memory: torch documents it for
# subclasses all the same.
wrapper = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]

# What `F.grouped_mm` was before it had that name; older code of models calls it still.
old_grouped_mm = torch._grouped_mm  # type: ignore[attr-defined]

# What `nn.Module.to` asks before it swaps tensors, and what torch counts then: no public function says
# either.
can_set_data = torch._has_compatible_shallow_copy_type  # type: ignore[attr-defined]
references = Tensor._use_count  # type: ignore[attr-defined]

# AOTAutograd asks for it of arguments that share memory.
get_base = Tensor._base.__get__  # type: ignore[attr-defined]

CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

# All that the dispatcher may know of a tensor whose memory holds its numbers. Others are a subclass, a fake
# or a sample of vmap, hold no numbers (meta, zeros that were never written), lie in another layout, or are to
# be negated when they are read.
_PLAIN_KEYS = functools.reduce(
    operator.or_,
    (
        torch._C.DispatchKeySet(key).raw_repr()
        for name, key in torch._C.DispatchKey.__members__.items()
        if name in ("CPU", "CUDA", "XPU", "MPS", "HPU", "PrivateUse1", "ADInplaceOrView")
        or (
            name.startswith(("Autograd", "Autocast"))
            and name not in ("AutogradOther", "AutogradNestedTensor", "AutogradMeta", "Autograd")
        )
    ),
)
_SPECIAL_KEYS = ~_PLAIN_KEYS


def is_plain(t: Tensor) -> bool:
    """Whether the numbers of `t` lie in its memory, as a tensor's do."""
    return not dispatch_keys(t).raw_repr() & _SPECIAL_KEYS


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode AD is at work."""
    # Dynamo knows the answer to this question, and to no other of its kind: a product it traces would go
    # through an autograd.Function.
    return transform_is_active() or forward_ad._current_level >= 0


def tracing(*tensors: Tensor) -> bool:
    """Whether somebody must see the ops: a compiler, an exporter, a functorch transform, a dispatch mode or a
    profiler; or whether one of `tensors` is not what it seems to be, and the dispatcher knows what to do with
    it."""
    return (
        is_compiling()
        or modes_at_work() > 0
        or profiler._is_profiler_enabled
        or transform_is_active()  # `transformed`, without a call of 60 ns in every product
        or forward_ad._current_level >= 0
        or tracing_state() is not None
        or not all(map(is_plain, tensors))
    )


def below_autograd() -> Any:
    """A context in which an op is what it is below autograd, as in the `__torch_dispatch__` of the tensor
    that it is called on."""
    return torch._C._AutoDispatchBelowADInplaceOrView()


def never_compile_below(code: Any) -> None:
    """`never_compile_alone`, of all that a function of this code calls, too."""
    set_code_exec_strategy(code, FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP))


def fsdp_runs(module: Any) -> bool:
    """Whether FSDP2 has begun to run a module that `fully_shard` made: from there on it keeps the
    parameters."""
    return module._get_fsdp_state()._is_root is not None


def check_before_dlpack(kind: type) -> None:
    """Has the older `to_dlpack`, which asks no class of tensors and would give a capsule with address 0, ask
    `kind.__dlpack__` first."""
    to_dlpack: Any = torch.to_dlpack  # type: ignore[attr-defined]

    @functools.wraps(to_dlpack)
    def with_check(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tensor, kind):
            tensor.__dlpack__()  # type: ignore[attr-defined]
        return to_dlpack(tensor, *args, **kwargs)

    for module in (torch, torch.utils.dlpack):  # type: ignore[attr-defined]
        setattr(module, "to_dlpack", with_check)  # noqa: B010


def compile_ahead(program: Any, file: str, options: dict[str, Any]) -> Any:
    """What AOTInductor makes of an exported program, by way of `file`: a function. torch documents these two
    names."""
    return torch._inductor.aoti_load_package(
        torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs=options)
    )


if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # noqa: F401

    def hash_local_parts(kind: type) -> None:
        """Has torch's key of compiled graphs on disk know the local tensor of a DTensor, where that is of the
        class `kind`: it leaves it out, and an int4 weight took the graph of an int8 one."""
        hash_of_spec = getattr(DTensor, "_stable_hash_for_caching", None)
        if hash_of_spec is None:  # torch 2.11
            return

        def hash_of_spec_and_part(w: Any) -> str:
            part = w._local_tensor
            return (
                f"{hash_of_spec(w)}, {part._stable_hash_for_caching()}"
                if isinstance(part, kind)
                else hash_of_spec(w)
            )

        DTensor._stable_hash_for_caching = hash_of_spec_and_part  # type: ignore[method-assign]


def local_part(w: Any) -> Any:
    """The very tensor that a DTensor holds, which FSDP2 gathers, where `to_local` gives a view that has
    attributes of its own; a plain tensor itself."""
    return w._local_tensor if torch.distributed.is_available() and isinstance(w, DTensor) else w
