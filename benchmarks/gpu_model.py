"""A Llama of Llama 3.1 8B's shape in plain torch, with random weights: decoding and prefill, and loading a
checkpoint of it.

All 32 layers have weights of their own, so that a step reads from memory what a real one does. Query, key and
value are one product, as are gate and up, as serving engines have it; every linear layer is quantized, the
last one too.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_time import relative_error
from benchmarks.gpu_workers import Budget
from rtn_tensor import load, quantize_, rtn
from rtn_tensor import report as report_of


class Shape(NamedTuple):
    layers: int
    hidden: int
    between: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def head(self) -> int:
        return self.hidden // self.heads


LLAMA_8B = Shape(32, 4096, 14336, 32, 8, 128256)
SMALL = Shape(8, 2048, 5632, 16, 4, 32000)  # 1.0 GB in bf16
FORMATS = {"bf16": 16, "int8 g128": 8, "int4 g128": 4}
ROOM = 1024  # tokens in the key-value cache, all of them attended to
STEPS, ROUNDS = 32, 7
# Bytes of the device that `load` may take beside the finished model and the largest tensor of the checkpoint.
MARGIN = 64 << 20


class Layer(nn.Module):
    keys: Tensor
    values: Tensor

    def __init__(self, shape: Shape, batch: int, room: int):
        super().__init__()
        self.shape = shape
        self.before, self.between = nn.RMSNorm(shape.hidden, eps=1e-5), nn.RMSNorm(shape.hidden, eps=1e-5)
        self.qkv = nn.Linear(shape.hidden, (shape.heads + 2 * shape.kv_heads) * shape.head, bias=False)
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.between, bias=False)
        self.down = nn.Linear(shape.between, shape.hidden, bias=False)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(batch, shape.kv_heads, room, shape.head), persistent=False)

    def attend(self, x: Tensor, turn: Tensor, positions: Tensor) -> Tensor:
        (batch, tokens, _), (_, _, _, heads, kv_heads, _), head = x.shape, self.shape, self.shape.head
        q, k, v = (
            self.qkv(x)
            .view(batch, tokens, -1, head)
            .transpose(1, 2)
            .split([heads, kv_heads, kv_heads], dim=1)
        )
        q, k = rotated(q, turn), rotated(k, turn)
        self.keys[:, :, positions] = k
        self.values[:, :, positions] = v
        if tokens > 1:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:  # queries that share keys are the rows of one product
            scores = q.reshape(batch, kv_heads, -1, head) @ self.keys.mT * head**-0.5
            later = torch.arange(scores.shape[-1], device=x.device) > positions
            y = scores.float().masked_fill(later, -torch.inf).softmax(-1).to(x.dtype) @ self.values
            y = y.view(batch, heads, 1, head)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))

    def forward(self, x: Tensor, turn: Tensor, positions: Tensor) -> Tensor:
        x = x + self.attend(self.before(x), turn, positions)
        gate, up = self.gate_up(self.between(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding: pairs of halves of `x [..., T, D]`, turned by the angles of `turn [2, T, D / 2]`
    (cosines, sines)."""
    a, b = x.float().chunk(2, -1)
    cos, sin = turn
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class Llama(nn.Module):
    turns: Tensor

    def __init__(self, shape: Shape, batch: int = 1, room: int = 16):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList([Layer(shape, batch, room) for _ in range(shape.layers)])
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        frequencies = torch.logspace(0, -1, shape.head // 2 + 1, base=500000.0, dtype=torch.float32)[:-1]
        angles = torch.outer(torch.arange(room, dtype=torch.float32), frequencies)
        self.register_buffer("turns", torch.stack([angles.cos(), angles.sin()]), persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The logits [B, V] after `tokens [B, T]`, which stand at `positions [T]` of the cache."""
        x, turn = self.embedding(tokens), self.turns[:, positions]
        for layer in self.layers:
            x = layer(x, turn, positions)
        return self.head(self.norm(x[:, -1]))


def build(shape: Shape, weights: str, batch: int, room: int, device: str) -> Llama:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Llama(shape, batch, room).eval()
    finally:
        torch.set_default_dtype(before)
    if FORMATS[weights] < 16:
        quantize_(model, rtn(FORMATS[weights], 128))
    return model


def rounds_of(step: Callable[[], Any], steps: int) -> list[float]:
    """Seconds a step, of several runs of some steps one after another, as decoding goes."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    seconds = []
    for _ in range(ROUNDS):
        start.record()
        for _ in range(steps):
            step()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / steps)
    return seconds


def compiled_step(model: Llama, decoding: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """A step is one CUDA graph; the long launches of prefill need none, and there a layer is compiled once
    for all."""
    if decoding:
        return torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for layer in model.layers:
        layer.compile(fullgraph=True)
    return model


@torch.no_grad()
def speed(
    report: Callable[[dict], None],
    budget: Budget,
    weights: str,
    batch: int,
    prompt: int,
    device: str = "cuda",
    shape: Shape = LLAMA_8B,
    room: int = ROOM,
    rounds: Callable[[Callable[[], Any], int], list[float]] = rounds_of,
    compiled: Callable[[Llama, bool], Callable[[Tensor, Tensor], Tensor]] = compiled_step,
) -> None:
    """Decoding of `batch` sequences, or where `prompt` is not 0 prefill of so many tokens."""
    decoding = not prompt
    model = build(shape, weights, batch, prompt or room, device)
    tokens = torch.randint(0, shape.vocabulary, (batch, prompt or 1), device=device)
    positions = torch.arange(prompt, device=device) if prompt else torch.tensor([room - 1], device=device)
    eager = model(tokens, positions).clone()
    assert bool(eager.isfinite().all()), "logits that are not finite"
    started = time.perf_counter()
    step = compiled(model, decoding)
    for _ in range(3):
        logits = step(tokens, positions).clone()
    compiling = time.perf_counter() - started
    error = relative_error(logits, eager)
    assert error < 0.1, f"the compiled model is off by {error:.3g} of the norm of the eager one"
    seconds = rounds(partial(step, tokens, positions), STEPS if decoding else 1)
    read = sum(row.bytes_after for row in report_of(model).rows if row.name != "embedding.weight")
    median = statistics.median(seconds)
    report(
        {
            "what": "decode" if decoding else "prefill",
            "weights": weights,
            "batch": batch,
            "tokens": prompt or room,
            "seconds": median,
            "spread": (max(seconds) - min(seconds)) / median,
            "tokens_per_s": batch * (prompt or 1) / median,
            "bytes_per_s": read / median,
            "compile_seconds": compiling,
            "relative_error": error,
        }
    )


# ------------------------------------------------------------------------------------ load


class DeviceMemory:
    """Bytes that torch holds on the GPU."""

    def begin(self) -> int:
        gc.collect()  # a model that is left over would go at some later time
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def end(self) -> tuple[int, int]:
        """Now, and at most since it began."""
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()


def loading(
    report: Callable[[dict], None],
    budget: Budget,
    device: str = "cuda",
    shape: Shape = SMALL,
    memory: Any = None,
    runs: int = 2,
) -> None:
    """What `rtn_tensor.load` takes of the device above the finished model, and its seconds beside those of
    reading the floats there."""
    from safetensors.torch import load_file, save_file

    memory = memory or DeviceMemory()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        tensors = {name: t.cpu() for name, t in build(shape, "bf16", 1, 16, device).state_dict().items()}
        save_file(tensors, file)
        total, largest = sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values())
        del tensors
        started = time.perf_counter()
        floats = load_file(file, device=device)
        memory.end()
        reading = time.perf_counter() - started
        del floats
        for weights, bits in FORMATS.items():
            for run in range(runs):
                begun = memory.begin()
                started = time.perf_counter()
                config = None if bits == 16 else rtn(bits, 128)
                model = load(file, config, lambda: Llama(shape).bfloat16().eval(), device, progress=False)
                finished, most = memory.end()
                report(
                    {
                        "weights": weights,
                        "run": run + 1,
                        "checkpoint_bytes": total,
                        "largest_tensor_bytes": largest,
                        "finished_bytes": finished - begun,
                        "extra_bytes": most - finished,
                        "allowed_extra_bytes": largest + MARGIN,
                        "seconds": time.perf_counter() - started,
                        "read_seconds": reading,
                    }
                )
                del model
