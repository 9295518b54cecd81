"""vLLM in this process, one engine after another, and what its tokens are held to."""

import gc
import os
from contextlib import contextmanager
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

PROMPTS = [[5, 77, 130, 9, 201, 64, 33, 21], [99, 98, 97]]
# What log probabilities of two engines differ by: at most 2e-5 was seen in fp32, 0.005 in fp16, and 0.27 in
# bf16, where each rounds norms, attention and experts in its own order. Between int8 weights and the float
# ones it is 0.1 and more, so fp32 tells them apart.
ROUNDING = {"float32": 2e-4, "float16": 0.02, "bfloat16": 0.5}


def memory() -> int:
    """Bytes of this process, without what files and shared libraries take."""
    return 1024 * int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])


@contextmanager
def engine(folder: Path, **options):
    """An LLM of the model at `folder`, gone at the end, whether or not it came to be."""
    defaults = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 4, "enforce_eager": True, "seed": 0}
    llm = None
    try:
        llm = LLM(model=str(folder), **defaults | options)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def rtn(**options) -> dict:
    """The keyword arguments of an LLM that is to be quantized so."""
    return {"hf_overrides": {"quantization_config": {"quant_method": "rtn", **options}}}


def greedy(llm, prompts=PROMPTS, new=16, **options) -> list[tuple[list[int], list[float]]]:
    """Of each prompt, the tokens after it and their log probabilities."""
    sampling = SamplingParams(temperature=0, max_tokens=new, logprobs=1, ignore_eos=True)
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False, **options
    )
    return [
        (list(o.token_ids), [step[t].logprob for step, t in zip(o.logprobs, o.token_ids, strict=True)])
        for o in (output.outputs[0] for output in outputs)
    ]


@torch.no_grad()
def difference(model, generated, prompts=PROMPTS) -> float:
    """How far, in log probability, the generated tokens are from what the transformers `model` gives: from
    its own log probability of each, and from that of its favourite, which a token is allowed to miss by
    rounding only."""
    worst = 0.0
    for prompt, (tokens, logprobs) in zip(prompts, generated, strict=True):
        logits = (
            model(torch.tensor([prompt + tokens[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :].float()
        )
        expected = logits.log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        worst = max(
            worst,
            (chosen - torch.tensor(logprobs)).abs().max().item(),
            (expected.amax(1) - chosen).max().item(),
        )
    return worst
