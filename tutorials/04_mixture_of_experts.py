"""Quantize the experts of a mixture-of-experts model, choose how they run, compile it, and save it.

python tutorials/04_mixture_of_experts.py
"""

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn
from torchao.quantization import FqnToConfig
from transformers import MixtralConfig, MixtralForCausalLM

from rtn_tensor import dequantize_, load, quantize_, rtn_int4, rtn_int8, save

torch.manual_seed(0)
sizes = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 1000,
}
config = MixtralConfig(**sizes, num_local_experts=8, num_experts_per_tok=2, initializer_range=0.1)
tokens = torch.randint(1000, (2, 16))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(tokens).logits


# 1. transformers keeps the experts of a layer in two stacks, [8, 1024, 256] and [8, 256, 512]. They are
# quantized; the router is not.
model = MixtralForCausalLM(config).eval()
report = quantize_(model, rtn_int4(group_size=64))
for row in report.rows:
    if ".mlp." in row.name:
        print(
            row.name,
            row.shape,
            f"{row.bits} bits" if row.bits else "float",
            f"{row.bytes_before:,} -> {row.bytes_after:,} bytes",
        )

# 2. They run by a function of ours, two products per layer over all tokens and experts at once. transformers'
# own functions take them, too.
print("experts implementation:", model.config._experts_implementation)
exact = copy.deepcopy(model)
dequantize_(exact)  # float weights again, those that the integers stand for
exact.set_experts_implementation("eager")
for implementation in ("eager", "batched_mm", "grouped_mm", "rtn"):
    model.set_experts_implementation(implementation)
    error = (logits(model) - logits(exact)).norm() / logits(exact).norm()
    print(f"{implementation}: {error:.1e} from the dequantized model")
    assert error < 1e-5

# 3. Compiled, a layer is one graph.
block, x = model.model.layers[0].mlp, torch.randn(1, 16, 256)
with torch.no_grad():
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))

# 4. Each part may have a precision of its own: here 8 bits in the down projections, 4 in other experts'
# weights and in attention.
model = MixtralForCausalLM(config).eval()
quantize_(model, FqnToConfig({r"re:.*\.down_proj": rtn_int8(), r"re:.*\.(gate_up|[qkvo])_proj": rtn_int4()}))
experts = model.model.layers[0].mlp.experts
print(experts.gate_up_proj, experts.down_proj, sep="\n")

# 5. Saved and loaded, it is the same to the last bit. `load` also quantizes the experts of a float folder, as
# it reads them.
with tempfile.TemporaryDirectory() as folder:
    save(model, Path(folder) / "mixed")
    again = load(Path(folder) / "mixed")
    assert torch.equal(logits(again), logits(model))


# 6. Experts that are modules of their own need nothing of this: they are linears, in a list beside their
# router.
class PlainExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(256, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(256, 512), nn.SiLU(), nn.Linear(512, 256)) for _ in range(4)
        )

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).max(-1)
        return torch.stack(
            [w * self.experts[e](row) for row, w, e in zip(x, weights, chosen.tolist(), strict=True)]
        )


plain = PlainExperts()
print(quantize_(plain, rtn_int8(group_size=64)), plain(x[0]).shape, sep="\n")
