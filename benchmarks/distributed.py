"""What training and serving around quantized weights costs, section by section.

    python -m benchmarks.distributed [SECTION ...] [--json FILE] [--threads 2] [--runs 3]

refresh: fresh bf16 weights, as a trainer sends them after each of its steps, into a model that is quantized,
compiled and answering: by `copy_`, and by building and quantizing another model. Of the ways to build one,
the constructor fills it with random numbers first; on meta it is only its weights and `quantize_`. The ways
take turns; medians.

fsdp2: a stack of Llama-shaped MLPs on two gloo ranks of this machine, one thread each, in bf16, int8 and
int4: bytes that a rank sends and receives to gather the weights of a forward pass, and seconds of one and of
a training step (forward and backward, to adapters below).
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

from benchmarks.machine import add_threads, machine
from rtn_tensor import RTNQuantizedTensor, quantize_, rtn, rtn_int4
from rtn_tensor.kernels import cpu
from rtn_tensor.text_table import table

# ---------------------------------------------------------------------------------- refresh

LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "vocab_size": 32000,
    "num_hidden_layers": 8,
}
IDS = torch.arange(16)[None]


def refresh(runs: int) -> list[dict]:
    """Seconds, and seconds until the first answer of the compiled model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**LLAMA)

    def quantized(model: nn.Module) -> nn.Module:
        quantize_(
            model,
            rtn_int4(128, "absmax"),
            lambda module, name: isinstance(module, nn.Linear) and name != "lm_head",
        )
        return model.eval()

    def on_meta(state: dict) -> nn.Module:
        with torch.device("meta"):
            model = LlamaForCausalLM(config).bfloat16()
        with torch.device("cpu"):  # made of no weight, it is not in the state dict
            model.model.rotary_emb = type(model.model.rotary_emb)(config)
        model.load_state_dict(state, assign=True)
        return quantized(model)

    def by_constructor(state: dict) -> nn.Module:
        model = LlamaForCausalLM(config).bfloat16()
        model.load_state_dict(state)
        return quantized(model)

    def copy(state: dict) -> nn.Module:
        for name, p in live.named_parameters():
            p.copy_(state[name])
        return live

    def fresh() -> dict:
        return {
            name: torch.empty(p.shape, dtype=torch.bfloat16).normal_(std=0.02)
            for name, p in empty.state_dict().items()
        }

    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    live = on_meta(fresh())
    compiled = torch.compile(live)
    compiled(IDS, use_cache=False)
    ways = {
        "copy_ into the live model": copy,
        "built on meta, assigned, quantize_": on_meta,
        "built, loaded, quantize_": by_constructor,
    }
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(runs):
        state = fresh()
        for way, run in ways.items():
            started = time.perf_counter()
            model = run(state)
            took = time.perf_counter() - started
            answers = compiled if model is live else torch.compile(model)
            with torch._dynamo.config.patch(error_on_recompile=model is live):
                answers(IDS, use_cache=False)
            found[way].append((took, time.perf_counter() - started))
            for name, p in model.named_parameters():  # the same bits, whatever the way
                assert torch.equal(p, live.get_parameter(name)), name
            del model, answers
    packed = sum(p.numel() for p in live.parameters() if isinstance(p, RTNQuantizedTensor))
    total = sum(p.numel() for p in live.parameters())
    rows = []
    for way, times in found.items():
        took, answering = (statistics.median(column) for column in zip(*times, strict=True))
        rows.append(
            {"way": way, "parameters": total, "quantized": packed, "seconds": took, "answering": answering}
        )
    ours = rows[0]
    print(f"refresh of {total / 1e6:.0f} M parameters, {packed / 1e6:.0f} M of them in int4")
    columns = [
        [r["way"], *(f"{r[key]:.2f} ({r[key] / ours[key]:.1f})" for key in ("seconds", "answering"))]
        for r in rows
    ]
    print(table(["way", "seconds (times ours)", "until the compiled model answers"], columns))
    return rows


# ----------------------------------------------------------------------------------- FSDP2

RANKS, WIDTH, INNER, BLOCKS, TOKENS = 2, 2048, 5632, 4, 64
KINDS = {"bf16": None, "int8, group_size 128": rtn(8), "int4, group_size 128": rtn(4, 128, "absmax")}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up, self.down = nn.Linear(WIDTH, 2 * INNER, bias=False), nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


def _rank(rank: int, folder: str, runs: int, results) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    gathered = [0]

    class Counted(DefaultAllGather):
        def __call__(self, output_tensor, *args, **kwargs):
            gathered[0] += output_tensor.nbytes
            return super().__call__(output_tensor, *args, **kwargs)

    models: dict[str, nn.Module] = {}
    for kind, config in KINDS.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Block() for _ in range(BLOCKS))).bfloat16()
        for block in model[1:]:
            block.requires_grad_(False)
            if config is not None:
                quantize_(block, config)
            fully_shard(block, reshard_after_forward=True).set_custom_all_gather(Counted())
        models[kind] = model
    x = torch.randn(TOKENS, WIDTH).bfloat16()
    found: dict[str, list] = {kind: [] for kind in KINDS}
    for run in range(runs + 1):
        for kind, model in models.items():
            dist.barrier()
            gathered[0], started = 0, time.perf_counter()
            with torch.no_grad():
                model(x)
            forward, sent = time.perf_counter() - started, gathered[0]
            dist.barrier()
            started = time.perf_counter()
            model(x).float().square().mean().backward()
            if run:  # the first is warming up
                found[kind].append((sent, forward, time.perf_counter() - started))
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


def fsdp2(runs: int) -> list[dict]:
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _rank, (folder, runs, results), nprocs=RANKS, join=False, start_method="spawn"
        )
        found = results.get()
        while not context.join():  # type: ignore[union-attr]
            pass
    rows = []
    for kind, times in found.items():
        sent, forward, step = (statistics.median(column) for column in zip(*times, strict=True))
        rows.append({"weights": kind, "bytes": sent, "forward": forward, "step": step})
    dense = rows[0]
    print(f"FSDP2, {RANKS} ranks, {BLOCKS} MLPs of {WIDTH} x {INNER}, {TOKENS} tokens per rank")
    columns = [
        [
            r["weights"],
            f"{r['bytes'] / 1e6:,.1f} ({r['bytes'] / dense['bytes']:.3f})",
            *(f"{r[key]:.2f} ({dense[key] / r[key]:.1f})" for key in ("forward", "step")),
        ]
        for r in rows
    ]
    print(
        table(
            ["weights", "MB gathered (of bf16)", "s a forward (times as fast)", "s a step (times as fast)"],
            columns,
        )
    )
    return rows


# ------------------------------------------------------------------------------------- all

SECTIONS = {"refresh": refresh, "fsdp2": fsdp2}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distributed", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)"
    )
    add_threads(parser)
    parser.add_argument(
        "--runs", type=int, default=3, metavar="R", help="of which the median is taken (default: 3)"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write rows, machine and versions there; other sections stay",
    )
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for name in args.sections or SECTIONS:
        rows = SECTIONS[name](args.runs)
        results[name] = {
            "machine": machine() | {"instruction_set": cpu.isa()},
            "runs": args.runs,
            "rows": rows,
        }
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
