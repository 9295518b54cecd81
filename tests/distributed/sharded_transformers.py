"""transformers' own tensor parallelism of quantized models."""

import pytest
import torch
import torch.distributed as dist
import transformers
from ranks import Cases
from sharded_models import same
from torch.distributed.tensor import DTensor
from torchao.quantization import FqnToConfig

from rtn_tensor import RTNQuantizedTensor, load, rtn_int4, save

case = Cases(2, 3)

IDS = torch.tensor([[5, 77, 13, 9, 20, 64]])
COMMON = {
    **{
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
    **{
        "head_dim": 32,
        "vocab_size": 120,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.1,
    },
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 384}


def made(name, folder, **more):
    """A folder with a float model, and one with the same quantized; and the quantized one."""
    path = f"{folder}/{name}"
    if dist.get_rank() == 0:
        config = getattr(transformers, f"{name}Config")(**COMMON | more)
        getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(path)
        save(load(path, rtn_int4(group_size=32)), f"{path}-quantized", force=True)
    dist.barrier()
    return path, load(f"{path}-quantized")


def on_ranks(path, **options):
    distributed = transformers.distributed.DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, distributed_config=distributed, **options
    )


def part(model, name):
    w = model.get_parameter(name)
    return w.to_local() if isinstance(w, DTensor) else w


@torch.no_grad()
def check(model, whole, ranks):
    """Parts of weights, quantized, and the answers of the whole model."""
    for name, w in whole.named_parameters():
        if isinstance(w, RTNQuantizedTensor):
            assert isinstance(part(model, name), RTNQuantizedTensor), name
            assert part(model, name).numel() == w.numel() // ranks, name
    same(model(IDS).logits, whole(IDS).logits)


@case
def llama(ranks, folder):
    path, whole = made("Llama", folder)
    check(
        on_ranks(path, quantization_config=transformers.TorchAoConfig(rtn_int4(group_size=32))), whole, ranks
    )
    check(on_ranks(f"{path}-quantized"), whole, ranks)


@case
def qwen3_moe(ranks, folder):
    path, whole = made("Qwen3Moe", folder, **MOE)
    config = FqnToConfig(
        {
            r"re:.*experts\..*_proj": rtn_int4(group_size=32),
            r"re:.*self_attn\..*_proj": rtn_int4(group_size=32),
        }
    )
    check(on_ranks(path, quantization_config=transformers.TorchAoConfig(config)), whole, ranks)
    check(on_ranks(f"{path}-quantized"), whole, ranks)


@case
def cuts_inside_a_group(ranks, folder):
    path, _ = made("Llama", folder, intermediate_size=48 * ranks)
    with pytest.raises(RuntimeError, match="CONVERSION"):  # transformers prints our error under that heading
        on_ranks(path, quantization_config=transformers.TorchAoConfig(rtn_int4(group_size=32)))
