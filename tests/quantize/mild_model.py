"""A model small enough to be refined in a test, and what is asked of it."""

import torch
from tiny_llama import tiny_llama

from rtn_tensor import RTNQuantizedTensor, rtn_int4

CONFIG = rtn_int4(32, "search")
SMALL = {"sequences": 4, "length": 64}


def mild(**kwargs):
    """A `tiny_llama` with logits of a trained model's size."""
    model = tiny_llama(**kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.3 if p.dim() > 1 else 1.0)
    return model


@torch.no_grad()
def divergence(model, reference, ids):
    one, two = (m(ids, use_cache=False).logits.float().log_softmax(-1) for m in (reference, model))
    return float((one.exp() * (one - two)).sum(-1).mean())


def own_text(model, seed=5, sequences=8, length=64):
    torch.manual_seed(seed)
    start = torch.zeros(sequences, 1, dtype=torch.long)
    return model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, min_new_tokens=length,
        max_new_tokens=length, pad_token_id=0,
    )  # fmt: skip


def quantized(model):
    return {name: p for name, p in model.named_parameters() if isinstance(p, RTNQuantizedTensor)}


def same_weights(one, other):
    one, other = quantized(one), quantized(other)
    return one.keys() == other.keys() and all(
        torch.equal(w.qdata, other[name].qdata) and torch.equal(w.scale, other[name].scale)
        for name, w in one.items()
    )
