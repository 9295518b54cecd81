"""How an op of `torch.ops.rtn` is registered: its schema, implementation, fake and derivatives."""

import functools
from typing import Any

import torch
from torch import Tensor

from rtn_tensor import arguments
from rtn_tensor._torch import autocast_is_enabled, without_autocast

OPS = torch.library.Library("rtn", "DEF")
rtn_ops = torch.ops.rtn


def define(schema: str):
    """Registers the decorated function, after a check of its arguments, as the implementation of an op on
    every backend."""
    OPS.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    check = getattr(arguments, f"check_{name}")

    def register(fn):
        @functools.wraps(fn)
        def run(*args):
            check(*args)
            if not autocast_is_enabled():
                return fn(*args)
            with without_autocast():  # else it redoes the fp32 products inside a kernel in its own dtype
                return fn(*args)

        OPS.impl(name, dispatched(name, run), "CompositeExplicitAutograd")
        return run

    return register


def fake(name: str):
    """Registers the decorated function as what `rtn::name` gives on fake tensors, after the same check."""
    check = getattr(arguments, f"check_{name}")

    def register(fn):
        @functools.wraps(fn)
        def run(*args):
            check(*args)
            return fn(*args)

        torch.library.register_fake(f"rtn::{name}", run, lib=OPS)
        return run

    return register


def dispatched(name: str, run):
    """`run`, of the op `name`, as the dispatcher may call it."""

    def call(*args):
        for i, t in enumerate(args):
            if isinstance(t, Tensor) and (why := unfit(t)):
                raise TypeError(
                    f"rtn::{name}: {getattr(rtn_ops, name).default._schema.arguments[i].name} is {why}"
                )
        y = run(*args)
        # Autograd refuses an in-place change of an op's output that is a view, as that of a linear over a 3-D
        # x is.
        return torch.ops.aten._unsafe_view(y, y.shape) if isinstance(y, Tensor) and y._is_view() else y

    return call


def unfit(t: Tensor) -> str | None:
    """None where the numbers of `t` lie in dense memory, which is all that the ops read; else what it is, and
    what to do."""
    if t.is_nested:
        return (
            "a nested tensor, where a dense one is needed; use the values() of a jagged one, or "
            "call it for each of unbind()"
        )
    if t.is_quantized:
        return f"of torch's own {t.dtype}, where plain numbers are needed; use .dequantize()"
    if t.layout is not torch.strided:
        return f"of {t.layout}, where a dense tensor is needed; use .to_dense()"
    return None


def wants_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def differentiable(name: str, forward, setup, backward, jvp, vmap) -> Any:
    """Registers the autograd of `rtn::name`, and gives the same, with `jvp` and `vmap`, as a function for
    torch.func and forward-mode AD: those refuse what register_autograd makes, or take it for a constant.
    `forward` calls the op, with the op's own parameters: Dynamo, where it gives up the frame around a
    product, traces it by itself and cannot take `*args`."""
    torch.library.register_autograd(f"rtn::{name}", backward, setup_context=setup, lib=OPS)
    members = {"forward": forward, "setup_context": setup, "backward": backward, "jvp": jvp, "vmap": vmap}
    return type(
        f"_{name}",
        (torch.autograd.Function,),
        {name: staticmethod(member) for name, member in members.items()},
    ).apply


def save_planes(ctx, *planes: Tensor) -> None:
    """The packed planes and nothing else: 0.28 of a bf16 weight at int4."""
    ctx.save_for_backward(*planes)
    ctx.save_for_forward(*planes)


def batch_first(info, dim: int | None, t: Tensor) -> Tensor:
    """`t` with vmap's batch as its first dim, whether it has one or is the same for all."""
    return t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)


def refuse_vmapped_planes(op: str, dims) -> None:
    if any(dim is not None for dim in dims):
        raise NotImplementedError(
            f"rtn::{op} cannot vmap over its weight; vmap over x, or use torch.bmm with one weight [E, N, K]"
        )
