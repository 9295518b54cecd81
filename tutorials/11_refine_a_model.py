"""Refine four bits: the same size as plain rounding, nearer to the float model, still without data.

python tutorials/11_refine_a_model.py
"""

import copy
import tempfile
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rtn_tensor import compare, load, plan, quantize_, refine_, rtn_int4

warnings.filterwarnings("ignore", message="the quantized model's next-token distributions differ")
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
)
model = LlamaForCausalLM(config).eval()
with torch.no_grad():
    for p in model.parameters():
        p.mul_(4 if p.dim() > 1 else 1)  # so that it predicts something, as a trained model does

# Plain rounding takes each weight to the nearest of 16 levels, and looks at nothing else.
plain = copy.deepcopy(model)
quantize_(plain, rtn_int4())

# Refined, the model writes some text itself, and each column's error is made up for by the columns after it,
# as the inputs of the layer over that text say. A real model writes the default of 16 sequences of 256
# tokens.
refined = copy.deepcopy(model)
result = refine_(refined, rtn_int4(), length=128)
print(result)

# The sizes are equal, and the refined model is nearer to the float one on text that neither has seen.
text = model.generate(torch.tensor([[1]]), do_sample=True, min_new_tokens=200, max_new_tokens=200)
for name, other in (("plain", plain), ("refined", refined)):
    print(f"{name}: {compare(other, model, text)}")

# It takes rules and plans as quantize_ does: here more bits where they help most, and refined.
rules = plan(model, bits_per_weight=5.0, length=128)
planned = copy.deepcopy(model)
refine_(planned, rules, length=128)
print(f"a refined plan of {rules.bits_per_weight:.2f} bits: {compare(planned, model, text)}")

# Tokens of your own domain can take the place of the model's own text: int64, [sequences, length].
on_tokens = copy.deepcopy(model)
refine_(on_tokens, rtn_int4(), tokens=text[:, :200].view(4, 50))

# From a folder the float model is never in memory: load() rounds it plainly, and refine_ reads the float
# weights of one module after the other. `rtn-tensor quantize SRC DST --refine` does the same.
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    streamed = load(folder, rtn_int4())
    refine_(streamed, source=folder, length=128)
    print(f"from files: {compare(streamed, model, text)}")
