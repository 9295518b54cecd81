"""QLoRA among ranks: FSDP2 shards int4 weights and adapters, which train and go onto a whole model.

torchrun --nproc-per-node 2 tutorials/05_qlora_fsdp2.py
"""

import os
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from rtn_tensor import RTNQuantizedTensor, load, rtn_int4

# 1. GPUs and NCCL where there are some, else CPUs and gloo.
device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
if device.type != "cpu":
    torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
dist.init_process_group(dist.get_default_backend_for_device(device))
rank, ranks = dist.get_rank(), dist.get_world_size()

# 2. A float model in a folder that every rank reads, tiny and ignorant; yours comes from the Hub. `load`
# quantizes it on the way.
shared = [tempfile.mkdtemp() if rank == 0 else ""]
dist.broadcast_object_list(shared)
folder = Path(shared[0])
torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
config = LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.1, eos_token_id=None)
LlamaForCausalLM(config).save_pretrained(folder / "float")  # by rank 0 alone
dist.barrier()
model = load(folder / "float", rtn_int4(group_size=64)).to(device)

# 3. Adapters, the same on every rank; activations of a block are computed again in the backward; each block
# is sharded, then the rest.
adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
model.add_adapter(adapter)
apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)
quantized = [
    p for p in model.parameters() if isinstance(p, DTensor) and isinstance(p.to_local(), RTNQuantizedTensor)
]
frozen = [w.to_local().qdata.clone() for w in quantized]
print(
    f"rank {rank}: {sum(len(w.to_local()) for w in quantized)} of {sum(len(w) for w in quantized)} rows of "
    "int4 weights"
)

# 4. Train it to count, each rank on numbers of its own. Quantized weights get no gradient, and no state in
# the optimizer.
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2)
torch.manual_seed(rank)
for step in range(60):
    tokens = (torch.randint(64, (16 // ranks, 1)) + torch.arange(12)).to(device) % 64
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(loss.detach_(), op=dist.ReduceOp.SUM)
    if rank == 0 and (step % 20 == 0 or step == 59):
        print(f"step {step}: loss {loss.item() / ranks:.3f}")
assert all(torch.equal(w.to_local().qdata, before) for w, before in zip(quantized, frozen, strict=True))

# 5. Rank 0 gathers what every rank has of the adapters, puts it onto a whole copy of the quantized model, and
# saves it.
options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
state = get_model_state_dict(model, options=options)
if rank == 0:
    whole = load(folder / "float", rtn_int4(group_size=64))
    whole.add_adapter(adapter)
    whole.load_state_dict(state, strict=False)
    whole.save_pretrained(folder / "adapter")
    print(f"adapter: {(folder / 'adapter' / 'adapter_model.safetensors').stat().st_size:,} bytes")
    prompt = torch.tensor([[10, 11, 12, 13]])
    written = whole.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    print("after 10, 11, 12, 13:", written[0, 4:].tolist())
    shutil.rmtree(folder)
dist.destroy_process_group()
