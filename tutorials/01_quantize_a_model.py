"""Quantize a model, look at what happened, save it, refresh a weight in place, and train through it.

python tutorials/01_quantize_a_model.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

from rtn_tensor import RTNQuantizedTensor, dequantize_, explain, quantize_, rtn_int4, rtn_int8


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(1000, 256), nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256), nn.LayerNorm(256)
    ).bfloat16()


model = make_model()
tokens = torch.randint(1000, (4, 16))
with torch.no_grad():
    exact = model(tokens)

# 1. Quantize. No data is needed; the weights are checked first, and nothing changes if one is unfit.
report = quantize_(model, rtn_int4(group_size=128))
print(report)

# 2. The modules are what they were; only `weight` is another kind of tensor.
weight = model[1].weight
print(
    model[1],
    weight,
    f"qdata {list(weight.qdata.shape)} {weight.qdata.dtype}",
    f"scale {list(weight.scale.shape)}",
    sep="\n",
)
with torch.no_grad():
    error = (model(tokens) - exact).float().norm() / exact.float().norm()
print(f"relative error of the output: {error:.3f}")

# 3. Which kernel runs, and why no other?
print(explain(weight, torch.randn(4, 256, dtype=torch.bfloat16)))

# 4. Compile and save as usual.
compiled = torch.compile(model, fullgraph=True)
with torch.no_grad():
    torch.testing.assert_close(compiled(tokens), model(tokens))
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "quantized.pt"
    torch.save(model.state_dict(), path)
    print(f"{path.stat().st_size:,} bytes on disk")
    again = make_model()
    again.load_state_dict(torch.load(path, weights_only=True), assign=True)
with torch.no_grad():
    assert torch.equal(again(tokens), model(tokens))

# 5. Fresh float weights (after a training step elsewhere, say) quantize as they are copied in, whole or in
# part.
weight.copy_(torch.randn(1024, 256))
weight[:512].copy_(torch.randn(512, 256))

# 6. Gradients pass through frozen quantized weights, so an adapter below them trains.
adapter = nn.Linear(256, 256).bfloat16()
model[1:](adapter(model[0](tokens))).sum().backward()
assert adapter.weight.grad is not None
assert weight.grad is None

# 7. Other weights, other formats: a filter picks modules by type or by name.
mixed = make_model()
quantize_(mixed, rtn_int8(group_size=-1), filter_fn=lambda module, name: isinstance(module, nn.Embedding))
print(
    quantize_(
        mixed,
        rtn_int4(group_size=32, scale_method="signed"),
        filter_fn=lambda module, name: name in ("1", "3"),
    )
)

# 8. And back.
dequantize_(mixed)
assert not any(isinstance(p, RTNQuantizedTensor) for p in mixed.parameters())
