"""Embeddings of sentences on a CPU: all-MiniLM-L6-v2 float, quantized here, and in ONNX Runtime with its
dynamic int8, side by side: what they keep, and how fast they are.

    pip install sentence-transformers onnx onnxscript onnxruntime
    python -m benchmarks.embeddings [--threads T] [--json FILE]

- `distance`: the mean of 1 - cosine between the embeddings of 512 sentences of the Wikipedia text and those
  of the float model.
- `found`: of the ten sentences of 1024 that the float model ranks first for each of 128 others, the part that
  is among the ten that this one does.
- `batch` and `query`: the median milliseconds for 64 sentences at once, and for one of 12 tokens. Every
  engine is a process of its own, and they take turns, as each has threads of its own.

ONNX Runtime runs what `torch.onnx.export` gives, in fp32, and what its `quantize_dynamic` makes of that with
the options that sentence-transformers has for such processors: int8 weights, one scale a matrix, and
activations rounded to uint8.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import add_threads, machine
from benchmarks.real_data import sentences, wikipedia
from benchmarks.real_model import minilm
from rtn_tensor import quantize_, rtn, rtn_int4, rtn_int8
from rtn_tensor.config import RTNConfig

BATCH, DISTANCES, QUERIES, RANKED, TURNS = 64, 512, 128, 1024, 9
QUERY = "where did the first settlers of the valley come from"

Encode = Callable[[list[str]], Tensor]  # sentences to [S, 384], fp32 of length 1

OURS: dict[str, tuple[torch.dtype, RTNConfig | None]] = {
    "float fp32": (torch.float32, None),
    "float bf16": (torch.bfloat16, None),
    "int8": (torch.bfloat16, rtn_int8()),
    "int8, int8 activations": (torch.bfloat16, rtn_int8(activations="int8")),
    "int8, int8 activations, fp32": (torch.float32, rtn_int8(activations="int8")),
    "int4": (torch.bfloat16, rtn_int4()),
    "int4, int8 activations": (torch.bfloat16, rtn_int4(activations="int8")),
    "int4 g32 search8": (torch.bfloat16, rtn(bits=4, group_size=32, scale_method="search8")),
}
PEERS = ("ONNX Runtime fp32", "ONNX Runtime int8")


def ours(name: str) -> Encode:
    from sentence_transformers import SentenceTransformer

    dtype, config = OURS[name]
    model = SentenceTransformer(str(minilm()), device="cpu", model_kwargs={"dtype": dtype})
    if config is not None:
        quantize_(model, config)

    def encode(texts: list[str]) -> Tensor:
        found = model.encode(texts, batch_size=BATCH, convert_to_tensor=True, show_progress_bar=False)
        return torch.nn.functional.normalize(found.float(), dim=-1)

    return encode


def exported(folder: Path, int8: bool) -> Path:
    """MiniLM in ONNX, which takes token ids and the mask, and gives the last hidden states."""
    from transformers import AutoModel

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(minilm(), attn_implementation="eager").eval()

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            kinds = torch.zeros_like(ids)
            return self.model(input_ids=ids, attention_mask=mask, token_type_ids=kinds).last_hidden_state

    # Of a mask without zeros the exporter would make none.
    ids, mask = torch.arange(100, 116).view(2, 8), torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=512)}
    torch.onnx.export(
        Encoder().eval(), (ids, mask), folder / "fp32.onnx", dynamic_shapes=(sizes, sizes), verbose=False
    )
    if not int8:
        return folder / "fp32.onnx"
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(folder / "fp32.onnx", folder / "int8.onnx", weight_type=QuantType.QInt8)
    return folder / "int8.onnx"


def peer(name: str) -> Encode:
    import onnxruntime
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = exported(Path(folder), name.endswith("int8"))
        session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def embed(texts: list[str]) -> Tensor:
        given = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="np")
        (hidden,) = session.run(
            None, dict(zip(names, (given["input_ids"], given["attention_mask"]), strict=True))
        )
        mask = torch.from_numpy(given["attention_mask"])[..., None]
        mean = (torch.from_numpy(hidden) * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)

    def encode(texts: list[str]) -> Tensor:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # as sentence-transformers has it
        parts = [embed([texts[i] for i in order[at : at + BATCH]]) for at in range(0, len(texts), BATCH)]
        found = torch.empty(len(texts), parts[0].shape[1])
        found[order] = torch.cat(parts)
        return found

    return encode


def work(name: str, threads: int, file: Path) -> None:
    """One engine's process: writes its embeddings to `file` and a line that says so, then answers each line
    "batch" or "query" by seconds."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    encode = (peer if name in PEERS else ours)(name)
    texts = sentences(wikipedia(), RANKED + QUERIES)
    torch.save(encode(texts), file)
    print("ready", flush=True)
    for line in sys.stdin:
        given = texts[:BATCH] if line.strip() == "batch" else [QUERY]
        encode(given)
        start = time.perf_counter()
        for _ in range(calls := 1 if len(given) > 1 else 10):
            encode(given)
        print((time.perf_counter() - start) / calls, flush=True)


def answer(engine: subprocess.Popen) -> str:
    assert engine.stdout is not None
    return engine.stdout.readline()


def start(name: str, threads: int, file: Path) -> subprocess.Popen:
    """An engine that is ready, so that none starts while another computes."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.embeddings",
        "--threads",
        str(threads),
        "--work",
        name,
        str(file),
    ]
    engine = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if (said := answer(engine)) != "ready\n":
        raise RuntimeError(f"{name} did not start; it said {said!r}")
    return engine


def top(embeddings: Tensor) -> Tensor:
    """The ten of the ranked sentences nearest to each query, [QUERIES, 10]."""
    return (embeddings[RANKED:] @ embeddings[:RANKED].mT).topk(10).indices


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_threads(parser)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--work", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work[0], args.threads, Path(args.work[1]))
    names = [*OURS, *PEERS]
    times: dict[str, dict[str, list[float]]] = {name: {"batch": [], "query": []} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{i}.pt") for i, name in enumerate(names)}
        engines = {name: start(name, args.threads, file) for name, file in files.items()}
        for what in [kind for _ in range(TURNS) for kind in ("batch", "query")]:
            for name, engine in engines.items():
                print(what, file=engine.stdin, flush=True)
                times[name][what].append(float(answer(engine)))
        for engine in engines.values():
            engine.communicate()
        found = {name: torch.load(file) for name, file in files.items()}
    expected = found["float fp32"]
    torch.testing.assert_close(found[PEERS[0]], expected, rtol=0, atol=1e-4)  # the exported model is the same
    rows = []
    for name in names:
        nearest, others = top(expected), top(found[name])
        same = (nearest[:, :, None] == others[:, None]).any(-1).float().mean()
        cosine = (expected * found[name]).sum(-1)[:DISTANCES]
        ms = {kind: 1e3 * statistics.median(times[name][kind]) for kind in ("batch", "query")}
        rows.append({"name": name, "distance": float(1 - cosine.mean()), "found": float(same)} | ms)
        print(
            f"{name:30} distance {rows[-1]['distance']:.5f}  found {100 * same:5.1f} %  "
            f"batch {ms['batch']:7.1f} ms  query {ms['query']:6.2f} ms"
        )
    if args.json:
        from importlib.metadata import version

        torch.set_num_threads(args.threads)
        about = machine() | {name: version(name) for name in ("sentence-transformers", "onnxruntime")}
        args.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
