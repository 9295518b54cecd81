"""Serves folders by vLLM without any plugin, this library's included, and writes what it generates as JSON.

python tests/serving/stock.py RESULTS DTYPE FOLDER ...
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_PLUGINS"] = ""

from engine import engine, greedy

if __name__ == "__main__":
    results, dtype, *folders = sys.argv[1:]
    found = {}
    for folder in folders:
        with engine(Path(folder), dtype=dtype) as llm:
            model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
            methods = {
                name: type(getattr(m, "quant_method", None)).__name__ for name, m in model.named_modules()
            }
            found[folder] = greedy(llm), {n: m for n, m in methods.items() if m != "NoneType"}
    assert "rtn_tensor" not in sys.modules
    Path(results).write_text(json.dumps(found))
