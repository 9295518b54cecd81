"""Load a transformers model in 4 bits, generate, save it, and train a LoRA adapter over it with PEFT.

python tutorials/03_transformers_and_peft.py
"""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from rtn_tensor import RTNQuantizedTensor, report, rtn_int4

temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)

# 1. A float model on disk. This one is tiny and knows nothing; yours comes from the Hub.
torch.manual_seed(0)
sizes = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.1, eos_token_id=None)).save_pretrained(
    folder / "float"
)

# 2. transformers reads it and quantizes each weight as it comes. lm_head and the embedding stay float.
config = TorchAoConfig(rtn_int4(group_size=64))
model = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config)
print(report(model))

prompt = torch.tensor([[10, 11, 12, 13]])


def write(model) -> list[int]:
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    return tokens[0].tolist()


before = write(model)
print("before:", before)

# 3. Saved quantized, it is read without a config: config.json names ours. That needs `import rtn_tensor`
# first, as above; where it is missing transformers raises an error.
model.save_pretrained(folder / "int4")
again = AutoModelForCausalLM.from_pretrained(folder / "int4")
assert write(again) == before

# 4. An adapter. transformers' own `add_adapter` serves, and so does peft.get_peft_model. The weights under it
# stay frozen and packed.
model.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
assert all("lora_" in name for name in trained)
print(f"training {sum(p.numel() for p in trained.values()):,} of {model.num_parameters():,} parameters")
weight = model.model.layers[0].mlp.up_proj.base_layer.weight
assert isinstance(weight, RTNQuantizedTensor)
frozen = weight.qdata.clone()

# 5. Train it to count. transformers' Trainer takes this model, too.
model.train()
optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
for step in range(60):
    tokens = (torch.randint(64, (16, 1)) + torch.arange(12)) % 64
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0 or step == 59:
        print(f"step {step}: loss {loss.item():.3f}")
model.eval()
after = write(model)
print("after:", after)
assert torch.equal(weight.qdata, frozen)

# 6. Only the adapter is saved; it goes onto any copy of the quantized model.
model.save_pretrained(folder / "adapter")
print(f"adapter: {(folder / 'adapter' / 'adapter_model.safetensors').stat().st_size:,} bytes")
again.load_adapter(folder / "adapter")
assert write(again) == after
temporary.cleanup()
