"""Serve a model with vLLM, quantized while it loads or before, and check its tokens against transformers.

python tutorials/07_serve_with_vllm.py

Where vLLM is not installed, it says so and ends. In a shell, the same is

    pip install "rtn-tensor[vllm]"
    RTN_NUM_BITS=4 vllm serve MODEL --quantization rtn
"""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rtn_tensor import load, rtn_int4, save

if find_spec("vllm") is None:
    print("vLLM is not installed: pip install 'rtn-tensor[vllm]'")
    raise SystemExit

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

prompt = [5, 77, 130, 9]
sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def serve(folder: Path, **options) -> list[int]:
    """The tokens that vLLM gives after the prompt."""
    llm = LLM(
        str(folder),
        dtype="float32",
        max_model_len=64,
        enforce_eager=True,
        skip_tokenizer_init=True,
        **options,
    )
    tokens = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0].outputs[0].token_ids
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return list(tokens)


@torch.no_grad()
def by_transformers(model) -> list[int]:
    ids = list(prompt)
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


with tempfile.TemporaryDirectory() as work:
    folder = Path(work) / "model"
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 1000,
    }
    LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64, initializer_range=0.2)).save_pretrained(
        folder
    )

    # 1. Any float folder, quantized layer by layer while vLLM loads it. What the options leave out is
    # RTN_NUM_BITS and RTN_GROUP_SIZE. The first that matches a layer counts.
    rules = [["*.down_proj", {"bits": 8}], ["model.layers.0.self_attn.*", None]]
    tokens = serve(
        folder,
        hf_overrides={
            "quantization_config": {"quant_method": "rtn", "bits": 4, "group_size": 64, "rules": rules}
        },
    )
    print("8 bits in down_proj, 4 elsewhere, layer 0's attention float:", tokens)

    # 2. All of it in 4 bits: the same tokens as transformers gives with the same weights.
    tokens = serve(
        folder, hf_overrides={"quantization_config": {"quant_method": "rtn", "bits": 4, "group_size": 64}}
    )
    print("4 bits:", tokens)
    assert tokens == by_transformers(load(folder, rtn_int4(64, "absmax")))

    # 3. Quantized before, by `save` or `rtn-tensor quantize`, a folder needs no option: vLLM sees what it is.
    save(load(folder, rtn_int4(64, "absmax")), Path(work) / "int4")
    assert serve(Path(work) / "int4") == tokens
    print("from the quantized folder: the same")
