"""Tokens of two ranks, for a test: a program, as vLLM starts a process a rank, which runs the main module again."""

import json
import os
import sys

os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}

from engine import engine, greedy

if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    for folder, options in json.loads(sys.argv[1]):
        with engine(folder, tensor_parallel_size=2, **options) as llm:
            print("\n" + json.dumps({"result": greedy(llm)}), flush=True)
