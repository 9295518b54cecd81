"""Quantized experts in two launches, whatever model or engine they are of."""

from collections.abc import Callable

from torch import Tensor

from rtn_tensor import ops, reference
from rtn_tensor.tensor import RTNQuantizedTensor


def run(
    x: Tensor,
    up: RTNQuantizedTensor,
    down: RTNQuantizedTensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    experts: Tensor,
    router: Tensor | None,
    top_k: int,
    activation: str | Callable[[Tensor], Tensor],
) -> Tensor:
    """Quantized experts in two launches, whatever the routing: one for gate, up and the activation, one for
    down and the router's weights.

    Args:
        x: `[T, H]`, of the weights' dtype.
        up, down: `[E, 2 I, H]` and `[E, H, I]`, biases `[E, 2 I]` and `[E, H]`.
        experts: `[T * top_k]`, the expert of each pair of a token and one of its experts; of one that is not
            in 0 .. E - 1 the row is zero.
        router: `[T * top_k]`, what each pair's row is multiplied by.
        activation: one of `reference.ACTIVATIONS`; or a function of `[T * top_k, 2 I]`, called between the
            launches, which are then without gradients.

    Returns:
        `[T * top_k, H]`; the sum over top_k is the caller's.
    """
    # A pair a program, where they are so few that hardly two have the same expert: sorting them would take as
    # long as a product.
    handful = x.is_cuda and len(experts) <= max(8, up.shape[0] // 4)
    pairs, offs = (None, None) if handful else reference.sorted_pairs(experts, up.shape[0])
    (up_planes, up_format), (down_planes, down_format) = (
        ((w.qdata, w.scale), (w.bits, w.group_size, w.zero, w.activations is not None)) for w in (up, down)
    )
    named = activation if isinstance(activation, str) else ""
    h = ops.routed(x, *up_planes, up_bias, experts, pairs, offs, None, top_k, named, *up_format)
    if not isinstance(activation, str):
        h = activation(h)
    return ops.routed(h, *down_planes, down_bias, experts, pairs, offs, router, 1, "", *down_format)
