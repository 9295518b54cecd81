"""llama.cpp's tokens per second, for `benchmarks.cpu_model` to run in an environment that has `llama-cpp-python`.

    python llama_cpp_model.py FILE.gguf THREADS PROMPT_TOKENS NEW_TOKENS RUNS

Prints JSON: the weights' format -> {"prefill": tokens per second, "decode": ...}, medians over the runs.
"""

import ctypes
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import llama_cpp

FORMATS = {"BF16": 32, "Q8_0": 7, "Q4_0": 2}  # llama.cpp's own numbers of them


def measure(path: Path, threads: int, prompt: int, new: int, runs: int) -> dict[str, float]:
    llama = llama_cpp.Llama(
        str(path), n_ctx=prompt + new, n_threads=threads, n_threads_batch=threads, n_batch=prompt, n_ubatch=prompt, verbose=False
    )
    prefill, decode = [], []
    for _ in range(runs + 1):
        llama.reset()
        started = time.perf_counter()
        llama.eval(list(range(100, 100 + prompt)))
        prefill.append(prompt / (time.perf_counter() - started))
        llama.reset()
        llama.eval(list(range(100, 132)))
        started = time.perf_counter()
        for _ in range(new):
            llama.eval([llama.sample(temp=0.0)])
        decode.append(new / (time.perf_counter() - started))
    return {"prefill": statistics.median(prefill[1:]), "decode": statistics.median(decode[1:])}


def main() -> None:
    source, *numbers = sys.argv[1:]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, number in FORMATS.items():
            path = Path(folder) / f"{name}.gguf"
            how = llama_cpp.llama_model_quantize_default_params()
            how.ftype, how.allow_requantize = number, True
            if llama_cpp.llama_model_quantize(source.encode(), str(path).encode(), ctypes.byref(how)):
                raise RuntimeError(f"llama.cpp could not turn {source} into {name}")
            results[name] = measure(path, *map(int, numbers))
    print(json.dumps({"version": llama_cpp.__version__, "results": results}))


if __name__ == "__main__":
    main()
