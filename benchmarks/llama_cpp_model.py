"""llama.cpp's tokens per second, for `benchmarks.cpu_model` to run in an environment that has
`llama-cpp-python`.

    python llama_cpp_model.py FILE.gguf THREADS PROMPT_TOKENS NEW_TOKENS

Prints its version. Then, for each line "prefill FORMAT" or "decode FORMAT" on its standard input, one number:
tokens per second.
"""

import ctypes
import functools
import sys
import tempfile
import time
from pathlib import Path

import llama_cpp

FORMATS = {"BF16": 32, "Q8_0": 7, "Q4_0": 2}  # llama.cpp's own numbers of them


def prefill(llama: llama_cpp.Llama, prompt: int, _: int) -> float:
    llama.reset()
    started = time.perf_counter()
    llama.eval(list(range(100, 100 + prompt)))
    return prompt / (time.perf_counter() - started)


def decode(llama: llama_cpp.Llama, _: int, new: int) -> float:
    llama.reset()
    llama.eval(list(range(100, 132)))
    started = time.perf_counter()
    for _ in range(new):
        llama.eval([llama.sample(temp=0.0)])
    return new / (time.perf_counter() - started)


def main() -> None:
    source, *numbers = sys.argv[1:]
    threads, prompt, new = map(int, numbers)
    with tempfile.TemporaryDirectory() as folder:

        @functools.cache
        def load(name: str) -> llama_cpp.Llama:
            path = Path(folder) / f"{name}.gguf"
            how = llama_cpp.llama_model_quantize_default_params()
            how.ftype, how.allow_requantize = FORMATS[name], True
            if llama_cpp.llama_model_quantize(source.encode(), str(path).encode(), ctypes.byref(how)):
                raise RuntimeError(f"llama.cpp could not turn {source} into {name}")
            return llama_cpp.Llama(
                str(path),
                n_ctx=prompt + new,
                n_threads=threads,
                n_threads_batch=threads,
                n_batch=prompt,
                n_ubatch=prompt,
                verbose=False,
            )

        print(llama_cpp.__version__, flush=True)
        for line in sys.stdin:
            what, name = line.split()
            print({"prefill": prefill, "decode": decode}[what](load(name), prompt, new), flush=True)


if __name__ == "__main__":
    main()
