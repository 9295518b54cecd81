"""Quantize a checkpoint while it is read: the float model is never in memory.

python tutorials/02_load_a_checkpoint_larger_than_memory.py
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rtn_tensor import load, report, rtn_int4, rtn_int8, save

folder = Path(tempfile.mkdtemp())

# 1. A transformers folder (here one of random weights; yours may be larger than the machine's memory).
config = LlamaConfig(
    hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, vocab_size=4096
)
LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "float", max_shard_size="10MB")

# 2. Load it. The model is built empty; each tensor is read a few megabytes at a time, and quantized into its
# place.
model = load(folder / "float", rtn_int4(group_size=128))
print(report(model))
prompt = torch.arange(8)[None]
print(
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
)

# 3. Save what came of it. What stands at a path is always whole: it is written beside it, and renamed at the
# end.
save(model, folder / "int4", max_shard_size="2MB")
print(*sorted(path.name for path in (folder / "int4").iterdir()), sep="\n")

# 4. Load that: now the files are mapped, and nothing is quantized again.
again = load(folder / "int4")
with torch.no_grad():
    assert torch.equal(again(prompt).logits, model(prompt).logits)


# 5. Any module can be filled, from names of another kind, and with layers that fuse several of the
# checkpoint's.
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv_proj = nn.Linear(256, 512, bias=False)
        self.o_proj = nn.Linear(256, 256, bias=False)


rows = {"q_proj": 256, "k_proj": 128, "v_proj": 128, "o_proj": 256}
save_file(
    {f"encoder.{name}.weight": torch.randn(n, 256) for name, n in rows.items()},
    folder / "attention.safetensors",
)
attention = load(
    folder / "attention.safetensors",
    rtn_int8(),
    Attention,  # called with its parameters on the meta device
    rename={r"^encoder\.": ""},
    fuse={"qkv_proj": ["q_proj", "k_proj", "v_proj"]},
)
print(attention.qkv_proj.weight)

# 6. What does not fit is refused, with the file, the tensor and the reason, and the model given stays as it
# was.
try:
    load(folder / "attention.safetensors", rtn_int8(), Attention)
except ValueError as error:
    print(error)
