"""Spend bits where they help most: rules over names, layers or modules kept at 8 bits, and a plan.

python tutorials/08_selective_precision.py
"""

import copy
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rtn_tensor import (
    bits_per_weight,
    load,
    plan,
    quantize_,
    rtn_int4,
    rtn_int8,
    save,
    select_layers,
    select_modules,
)

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    vocab_size=512,
    head_dim=32,
)
model = LlamaForCausalLM(config).bfloat16().eval()
with torch.no_grad():  # a fresh model says nothing about any token; a trained one does
    for p in model.parameters():
        p.mul_(4 if p.dim() > 1 else 1)


@torch.no_grad()
def divergence(rules) -> float:
    """Of the quantized model's predictions from the float model's, in nats per token."""
    quantized = copy.deepcopy(model)
    quantize_(quantized, rules)
    ids = torch.randint(0, config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(1))
    p, q = (m(ids).logits.float().log_softmax(-1) for m in (model, quantized))
    return float((p.exp() * (p - q)).sum(-1).mean())


# Rules are pairs of a pattern and a format; the first that matches a weight's name, or its module's, counts.
# None is float.
rest = [("lm_head", None), ("*", rtn_int4(group_size=64, scale_method="search"))]
choices = {
    "all at 4 bits": rest,
    "two kinds of modules at 8": [("*.v_proj", rtn_int8()), ("*.down_proj", rtn_int8()), *rest],
    "the first layer at 8": [*select_layers(model, first=1), *rest],
    "that, and all v_proj at 8": [*select_layers(model, first=1), *select_modules(model, ["v_proj"]), *rest],
    "a plan": plan(model, bits_per_weight=5.25),  # as many bits as the first layer at 8 takes
}
print(select_layers(model, first=1), end="\n\n")
for name, rules in choices.items():
    print(
        f"{name:>28}: {bits_per_weight(model, rules):.3f} bits per weight, divergence {divergence(rules):.4f}"
    )

# A plan is a list of rules, too. Printed, it is a map of what was chosen; `draw` writes it as a picture.
print(f"\n{choices['a plan']}\n")

# Rules work in `load`, in `rtn-tensor quantize --rule '*.down_proj=8'`, and, as `fqn_config(path, rules)`, in
# TorchAoConfig.
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(f"{folder}/float")
    loaded = load(f"{folder}/float", choices["a plan"])
    save(loaded, f"{folder}/planned")
    again = load(f"{folder}/planned")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), again.parameters(), strict=True))
