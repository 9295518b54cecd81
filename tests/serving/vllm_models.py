"""Models that vLLM serves, and the tokens that it should give."""

import shutil
from pathlib import Path

import torch
from torchao.quantization import FqnToConfig
from transformers import AutoModelForCausalLM

from rtn_tensor import RTNQuantizedTensor, load, rtn_int4, rtn_int8, save

HERE = Path(__file__).parent


def reference(path, config=None, dtype=torch.float32, **kwargs):
    return load(path, config, dtype=dtype, **kwargs)


def saved(path, to, **kwargs):
    """The folder `to` of the model at `path`, quantized, with its tokenizer."""
    save(load(path, **kwargs), to)
    for file in path.glob("*token*"):
        shutil.copy(file, to)
    return to


def weights(llm) -> dict:
    """The model's quantized parameters by name."""
    model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
    return {name: p for name, p in model.named_parameters() if isinstance(p, RTNQuantizedTensor)}


def other(path, to):
    """The folder `to` of the model at `path` with other weights, but for GPT-OSS's attention sinks, which vLLM
    does not reload, in float models neither."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("sinks"):
                p.mul_(1.25).add_(0.01)
    model.save_pretrained(to)
    return to


def places(llm) -> dict:
    return {name: (w.qdata.data_ptr(), w.scale.data_ptr()) for name, w in weights(llm).items()}


# An engine takes seconds to start, so int4 and int8 share one: layers take turns.
ODD = r"re:.*\.layers\.\d*[13579]\..*(_proj|experts)"
BY_TURNS = FqnToConfig({ODD: rtn_int8(-1), r"re:.*\.layers\..*_proj": rtn_int4(64, "absmax")})
