"""How the folders beside this file were made, each by the library that it is named after: they are not made anew.

    python make.py NAME FOLDER

NAME is one of MADE, and FOLDER what becomes of it. Needs that library, and none of ours. Beside the folder's own
files `dequantized.safetensors` has two weights as the library itself gives them, in its own dtype.
"""

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
from tiny_llama import tiny_tokenizer

GROUP_SIZE = 32
SHOWN = ("k_proj", "down_proj")


def tokens() -> torch.Tensor:
    return torch.randint(2, 320, (64, 64), generator=torch.Generator().manual_seed(0))


def base(folder: str, even: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128 if even else 96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2 if even else 1,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).half().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def show(folder: str, weights: dict[str, torch.Tensor]) -> None:
    shown = {name: w.contiguous() for name, w in weights.items() if name.split(".")[-2] in SHOWN}
    save_file(shown, Path(folder) / "dequantized.safetensors")


def linears(model: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.weight": module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def gptqmodel(source: str, folder: str, **options: Any) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    made = {"bits": 4, "group_size": GROUP_SIZE, "desc_act": False, "sym": True} | options
    model = GPTQModel.load(source, QuantizeConfig(**made), device="cpu")
    model.quantize(
        [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in tokens()]
    )
    model.save(folder)
    if made.get("method") == "awq":
        again = GPTQModel.load(folder, device="cpu", backend="torch_awq").model
    else:
        again = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype="auto")
    modules = {name: module for name, module in again.named_modules() if hasattr(module, "qweight")}
    if made.get("method") == "awq":
        weights = {
            name: module(torch.eye(module.in_features, dtype=torch.float16)[None])[0].t()
            for name, module in modules.items()
        }
    else:
        weights = {name: module.dequantize_weight().t() for name, module in modules.items()}
    show(folder, {f"{name}.weight": w for name, w in weights.items()})


def llmcompressor(source: str, folder: str, bits: int, symmetric: bool, calibrated: bool) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": "group", "group_size": GROUP_SIZE} if bits == 4 else {"strategy": "channel"}
    groups = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    data = Dataset.from_dict({"input_ids": tokens().tolist(), "attention_mask": [[1] * 64] * 64})
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    recipe = (GPTQModifier if calibrated else QuantizationModifier)(**groups)
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=64, num_calibration_samples=32)
    model.save_pretrained(folder, save_compressed=True)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        again(tokens()[:1])  # at which it dequantizes
    show(folder, linears(again))


def auto_round(source: str, folder: str, how: str, symmetric: bool) -> None:
    import shutil

    from auto_round import AutoRound

    def saved(how: str, folder: str) -> Path:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(source)
        options = {"scheme": "W4A16", "group_size": GROUP_SIZE, "sym": symmetric, "iters": 0}
        rounding = AutoRound(model, tokenizer, **options, disable_opt_rtn=True, device_map="cpu")
        rounding.quantize_and_save(folder, format=how)
        return next(config.parent for config in Path(folder).rglob("config.json"))

    with tempfile.TemporaryDirectory() as work:
        shutil.copytree(saved(how, f"{work}/packed"), folder)
        fake = AutoModelForCausalLM.from_pretrained(saved("fake", f"{work}/fake"), dtype=torch.bfloat16)
        show(folder, linears(fake))


MADE: dict[str, Callable[[str, str], None]] = {
    "gptqmodel-gptq": gptqmodel,
    "gptqmodel-gptq-8-bits": partial(gptqmodel, bits=8),
    "gptqmodel-gptq-asymmetric": partial(gptqmodel, sym=False),
    "gptqmodel-gptq-v2-asymmetric": partial(gptqmodel, sym=False, format="gptq_v2"),
    "gptqmodel-gptq-act-order": partial(gptqmodel, desc_act=True),
    "gptqmodel-awq": partial(gptqmodel, sym=False, method="awq", format="gemm"),
    "llmcompressor-gptq": partial(llmcompressor, bits=4, symmetric=True, calibrated=True),
    "llmcompressor-gptq-asymmetric": partial(llmcompressor, bits=4, symmetric=False, calibrated=True),
    "llmcompressor-8-bits": partial(llmcompressor, bits=8, symmetric=True, calibrated=False),
    "auto-round": partial(auto_round, how="auto_round", symmetric=True),
    "auto-round-gptq": partial(auto_round, how="auto_gptq", symmetric=True),
    "auto-round-awq": partial(auto_round, how="auto_awq", symmetric=False),
}


if __name__ == "__main__":
    name, folder = sys.argv[1:]
    with tempfile.TemporaryDirectory() as work:
        base(work, even=name == "gptqmodel-awq")  # its search takes 64 rows at a time
        MADE[name](work, folder)
    # What a reader does not need; by hand, the names of temporary folders were taken out of the configs.
    kept = {"config.json", "model.safetensors", "dequantized.safetensors", "quantize_config.json"}
    for file in Path(folder).iterdir():
        if file.name not in kept:
            file.unlink()
