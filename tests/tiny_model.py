"""A small model with an embedding that may be tied, and what tests ask of any model."""

import pytest
import torch
from torch import nn

from rtn_tensor import RTNQuantizedTensor, quantize_


class Model(nn.Module):
    """An embedding, two linears with a norm between, and a head that may share the embedding's weight."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(20, 64)
        self.up = nn.Linear(64, 96)
        self.norm = nn.LayerNorm(96)
        self.down = nn.Linear(96, 64, bias=False)
        self.head = nn.Linear(64, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.down(self.norm(self.up(self.embed(ids)))))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 40, 64))
        self.bias = nn.Parameter(torch.randn(3, 40))


def formats(model):
    """{name: (bits, group_size)} of every quantized parameter."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: (w.bits, w.group_size) for name, w in parameters if isinstance(w, RTNQuantizedTensor)}


def all_weights(module, fqn):
    return isinstance(module, nn.Linear | nn.Embedding)


def rejected(model, *args, **kwargs):
    """The message of the ValueError that `quantize_` raises, having changed nothing."""
    before = [(name, w, w.detach().clone()) for name, w in model.named_parameters(remove_duplicate=False)]
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is the result)
        quantize_(model, *args, **kwargs)
    after = list(model.named_parameters(remove_duplicate=False))
    assert [name for name, _ in after] == [name for name, _, _ in before]
    for (name, now), (_, was, value) in zip(after, before, strict=True):
        assert now is was, name
        torch.testing.assert_close(now, value, rtol=0, atol=0, equal_nan=True)
    return str(caught.value)
