"""What a compiled call costs around the products: a 4-layer Llama so small that it computes next to nothing,
by what its weights are.

    python -m benchmarks.compile [--json FILE] [--turns 30]

float: plain parameters, torch's own products. planes: the quantized product on plain tensors, which is what
quantized weights are once unwrapped. quantized: `RTNQuantizedTensor` parameters. Quantized over planes is the
cost of the tensor subclass: its guards and unwrapping.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.machine import machine
from rtn_tensor import RTNQuantizedTensor, quantize_, rtn_int4
from rtn_tensor.text_table import table

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


class Planes(nn.Module):
    """A linear layer whose planes are buffers of their own."""

    def __init__(self, weight: RTNQuantizedTensor):
        super().__init__()
        self.register_buffer("qdata", weight.qdata)
        self.register_buffer("scale", weight.scale)
        self.bits, self.group_size = weight.bits, weight.group_size

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rtn.linear.default(x, self.qdata, self.scale, None, self.bits, self.group_size)


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def models() -> dict[str, nn.Module]:
    quantized, planes = llama(), llama()
    for model in (quantized, planes):
        quantize_(model, rtn_int4(group_size=32))
    for name, module in list(planes.named_modules()):
        if isinstance(module, nn.Linear):
            planes.set_submodule(name, Planes(module.weight))
    return {"float": llama(), "planes": planes, "quantized": quantized}


def measure(mode: str, turns: int, calls: int = 100) -> dict:
    """Microseconds a call, each kind's median over `turns`, the three in turn; ratios are medians of those
    within a turn."""
    ids = torch.tensor([[3]])

    def seconds(run: Callable) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            run(ids, use_cache=False)
        return (time.perf_counter() - started) / calls

    every = models()
    with MODES[mode]():
        compiled = {name: torch.compile(model, fullgraph=True) for name, model in every.items()}
        for run in compiled.values():
            seconds(run)
        times = [{name: seconds(run) for name, run in compiled.items()} for _ in range(turns)]
    row = {
        "mode": mode,
        "weights": sum(isinstance(p, RTNQuantizedTensor) for p in every["quantized"].parameters()),
    }
    for name in compiled:
        row[f"{name}_us"] = 1e6 * statistics.median(t[name] for t in times)
    for base in ("float", "planes"):
        row[f"over_{base}"] = statistics.median(t["quantized"] / t[base] for t in times)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--turns", type=int, default=30, metavar="R", help="of which the medians are taken (default: 30)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows, the machine and the versions there"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = [measure(mode, args.turns) for mode in MODES]
    headers = ["mode", "weights", "float us", "planes us", "quantized us", "over float", "over planes"]
    print(
        table(
            headers,
            [
                [
                    f"{v:.2f}" if k.startswith("over") else f"{v:.0f}" if k.endswith("us") else str(v)
                    for k, v in r.items()
                ]
                for r in rows
            ],
        )
    )
    if args.json:
        args.json.write_text(
            json.dumps({"machine": machine(), "turns": args.turns, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
