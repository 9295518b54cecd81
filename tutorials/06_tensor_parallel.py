"""Tensor parallelism: each rank reads, quantizes and multiplies by its own part of every weight.

torchrun --nproc-per-node 2 tutorials/06_tensor_parallel.py
"""

import os
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig
from transformers.distributed import DistributedConfig

from rtn_tensor import load, quantize_, report, rtn_int4, save

# 1. GPUs and NCCL where there are some, else CPUs and gloo; a folder that every rank reads.
device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
if device.type != "cpu":
    torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
dist.init_process_group(dist.get_default_backend_for_device(device))
rank, ranks = dist.get_rank(), dist.get_world_size()
shared = [tempfile.mkdtemp() if rank == 0 else ""]
dist.broadcast_object_list(shared)
folder = Path(shared[0])


# 2. A module of your own. Its plan cuts `up` by rows and `down` by columns, so one sum among the ranks ends
# both. A cut by columns must fall between groups: 512 / 2 is a multiple of 128.
class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(256, 512), nn.Linear(512, 256)

    def forward(self, x):
        return self.down(F.silu(self.up(x)))


plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
mesh = init_device_mesh(device.type, (ranks,))
torch.manual_seed(0)
whole = MLP().to(device)
if rank == 0:
    save(whole, folder / "mlp")
quantize_(whole, rtn_int4(group_size=128))
dist.barrier()

# 3. Made on meta, cut, then filled from the float checkpoint: a rank reads and quantizes its rows and columns
# only. Quantizing before or after `parallelize_module` gives the same numbers.
with torch.device("meta"):
    empty = MLP()
model = load(
    folder / "mlp", rtn_int4(group_size=128), model=parallelize_module(empty, mesh, plan), device=device
)
x = torch.randn(4, 256).to(device)
torch.testing.assert_close(model(x), whole(x), rtol=1e-4, atol=1e-5)
if rank == 0:
    print(report(model))
compiled = torch.compile(model, fullgraph=True)
torch.testing.assert_close(compiled(x), whole(x), rtol=1e-4, atol=1e-5)

# 4. A transformers model, by the plan that it brings along; quantized as it is read, or from a folder that is
# quantized already.
sizes = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
if rank == 0:
    LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.1, eos_token_id=None)).save_pretrained(
        folder / "llama"
    )
dist.barrier()
parallel = {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=ranks), "dtype": torch.float32}
llama = AutoModelForCausalLM.from_pretrained(
    folder / "llama", quantization_config=TorchAoConfig(rtn_int4(group_size=64)), **parallel
)
prompt = torch.tensor([[10, 11, 12, 13]]).to(device)
print(
    f"rank {rank}:", llama.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 4:].tolist()
)
dist.barrier()
if rank == 0:
    alone = load(folder / "llama", rtn_int4(group_size=64), dtype=torch.float32).to(device)
    print(
        "alone :", alone.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 4:].tolist()
    )
    shutil.rmtree(folder)
dist.destroy_process_group()
