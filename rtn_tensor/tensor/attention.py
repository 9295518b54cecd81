"""torch's fused ops of nn.MultiheadAttention and nn.TransformerEncoderLayer, taken apart into products.

The modules take them only where no parameter has a `__torch_function__`; but a compiler says that of none.
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from rtn_tensor.tensor.errors import named_error
from rtn_tensor.tensor.products import linear
from rtn_tensor.tensor.quantized import RTNQuantizedTensor, aten, on_op

KEY_PADDING = 1  # the mask_type of [B, L]; the others are [L, L] and [B, H, L, L]


def _project(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x, w, bias) if isinstance(w, RTNQuantizedTensor) else F.linear(x, w, bias)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What attends from query to key [B, L, E], and the weights [B, L, L], or [B, H, L, L]."""
    if query is key and key is value:
        qkv = _project(query, qkv_weight, qkv_bias).chunk(3, -1)
    else:
        rows = zip(qkv_weight.split(embed_dim), qkv_bias.split(embed_dim), strict=True)
        qkv = [_project(x, w, bias) for x, (w, bias) in zip((query, key, value), rows, strict=True)]
    q, k, v = (x.unflatten(-1, (num_head, -1)).transpose(1, 2) for x in qkv)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        if mask_type == KEY_PADDING:
            mask = mask[:, None, None, :]
        scores = scores.masked_fill(mask.bool(), float("-inf"))
    weights = scores.softmax(-1)
    y = _project((weights @ v).transpose(1, 2).flatten(2), proj_weight, proj_bias)
    if not need_weights:
        return y, None
    return y, weights.mean(1) if average_attn_weights else weights


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    def attended(x: Tensor) -> Tensor:
        weights = qkv_weight, qkv_bias, proj_weight, proj_bias
        return _attention(x, x, x, embed_dim, num_heads, *weights, mask, False, mask_type=mask_type)[0]

    def fed_forward(x: Tensor) -> Tensor:
        h = _project(x, ffn_weight_1, ffn_bias_1)
        return _project(F.gelu(h) if use_gelu else F.relu(h), ffn_weight_2, ffn_bias_2)

    def first(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attended(first(src))
        return x + fed_forward(second(x))
    x = first(src + attended(src))
    return second(x + fed_forward(x))


for _op, _handler in (
    (aten._native_multi_head_attention.default, _attention),
    (aten._transformer_encoder_layer_fwd.default, _encoder_layer),
):

    @on_op(_op)
    def call_attention(func, types, args, kwargs, _handler: Any = _handler):
        if args[0].is_nested:
            w = next(t for t in args if isinstance(t, RTNQuantizedTensor))
            raise named_error(
                w,
                "nested sequences are for float weights only; give padded ones, and make the encoder with "
                "enable_nested_tensor=False",
                NotImplementedError,
            )
        return _handler(*args, **kwargs)
