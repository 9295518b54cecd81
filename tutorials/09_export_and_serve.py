"""Export a quantized model, so that engines read it without this library: transformers, vLLM and others.

python tutorials/09_export_and_serve.py

It reads what it wrote by transformers where compressed-tensors is installed, and by vLLM where that is. In a
shell, the same is

    rtn-tensor quantize MODEL OUT --bits 4 --format compressed-tensors
    vllm serve OUT
"""

import json
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rtn_tensor import export, load, rtn_int4, rtn_int8

prompt = [5, 77, 130, 9]


@torch.no_grad()
def greedy(model) -> list[int]:
    ids = list(prompt)
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def by_vllm(folder: Path) -> list[int]:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_PLUGINS": "",  # none: this library's is not needed
    }
    from vllm import LLM, SamplingParams

    llm = LLM(str(folder), max_model_len=64, enforce_eager=True, skip_tokenizer_init=True)
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    return list(llm.generate([{"prompt_token_ids": prompt}], sampling)[0].outputs[0].token_ids)


with tempfile.TemporaryDirectory() as work:
    folder = Path(work) / "model"
    sizes = {"hidden_size": 320, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=1000, max_position_embeddings=64, initializer_range=0.2)
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)

    # 1. Quantize and export. 320 is no multiple of 128: groups of 64 with the same scales are written.
    model = load(folder, rtn_int4(128))
    report = export(model, Path(work) / "int4")
    print(*report.changes, *report.engines, sep="\n")
    tokens = greedy(model)

    # 2. transformers dequantizes it at the first forward: the very same weights.
    if find_spec("compressed_tensors"):
        assert greedy(AutoModelForCausalLM.from_pretrained(Path(work) / "int4")) == tokens
        print("transformers gives the same tokens:", tokens)

    # 3. Mixed precision: each format is a group in the config. GPTQ has them, too.
    mixed = load(folder, [("*.down_proj", rtn_int8(64)), ("*", rtn_int4(64))])
    export(mixed, Path(work) / "mixed")
    report = export(mixed, Path(work) / "gptq", format="gptq")
    about = json.loads((Path(work) / "gptq" / "config.json").read_text())["quantization_config"]
    print("GPTQ, by layer:", about["dynamic"])
    print(*report.engines, sep="\n")

    # 4. vLLM runs it by its own kernels.
    if find_spec("vllm"):
        print("vLLM gives", by_vllm(Path(work) / "int4"), "and this library", tokens)
