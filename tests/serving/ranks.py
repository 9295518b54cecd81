"""Tokens of two ranks for each case of a folder and options, as lines of JSON, for a test: a program, as vLLM
starts a process a rank."""

import json
import os
import sys

os.environ |= {
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    "TORCHDYNAMO_DISABLE": "1",
}

from engine import engine, greedy

if __name__ == "__main__":
    for folder, options in json.loads(sys.argv[1]):
        with engine(folder, **{"tensor_parallel_size": 2} | options) as llm:
            print("\n" + json.dumps({"result": greedy(llm)}), flush=True)
