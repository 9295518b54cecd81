"""The tables of README and docs/ hold the numbers that lie in benchmarks/results/, rounded."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.serving_report import markdown

ROOT = Path(__file__).resolve().parents[2]


def results(name: str):
    return json.loads((ROOT / "benchmarks/results" / name).read_text())


def tables(page: str) -> list[list[list[str]]]:
    """Each table's rows of cells, its header first."""
    found = re.findall(r"(?:^\|.*\n)+", (ROOT / page).read_text(encoding="utf-8"), re.M)
    split = [
        [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
        for table in found
    ]
    return [[rows[0], *rows[2:]] for rows in split]


def table(page: str, *header: str) -> dict[str, dict[str, str]]:
    """The one table of the page that has these columns: by the first cell of a row, its cells by column."""
    (rows,) = (rows for rows in tables(page) if set(header) <= set(rows[0]))
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}


def is_rounded(cell: str, value: float) -> bool:
    """Whether `cell` is `value`, to the digits that it has."""
    cell = cell.replace(",", "")
    return abs(float(cell) - value) <= 0.501 * 10.0 ** -len(cell.partition(".")[2])


ACCURACY = {row["weights"]: row for row in results("accuracy.json")["rows"]}
ALIASES = {  # what a row is called elsewhere
    "int8, group_size 128": "int8 g128",
    **{
        f"int4, group_size {size}, {method}": f"int4 g{size} {method}"
        for size in (32, 64)
        for method in ("absmax", "signed", "search")
    },
    "int4, group_size 64, the paper's formula": "int4 g64 absmax",
    **{f"int4, group_size {size}, refined": f"int4 g{size} refined" for size in (32, 64)},
    "int4, group_size 32, search, scales of 8 bits": "int4 g32 search8",
    "int4, group_size 32, refined, scales of 8 bits": "int4 g32 search8 refined",
    "plan of 5.0 bits, refined": "plan 5.0 refined",
    "int4, group_size 64, search (the default)": "int4 g64 search",
    "GPTQ, group_size 64, calibrated": "GPTQ g64",
    "GPTQ g64, calibrated": "GPTQ g64",
    "HQQ g64, asymmetric": "HQQ g64",
    **{f"plan of {bits} bits": f"plan {bits}" for bits in ("4.25", "4.5", "5.0")},
    "plan of 5.0 bits (some weights at int8)": "plan 5.0",
}


def score(row: dict, task: str) -> float | None:
    """The acc_norm of a task, or the metric that it has."""
    found = {s["metric"]: s["value"] for s in row["scores"] if s["task"] == task}
    if task in ("wikipedia", "sotu"):
        return found.get("perplexity")
    value = found.get("acc_norm", found.get("acc"))
    return None if value is None else 100 * value


@pytest.mark.parametrize("page", ["README.md", "docs/choose-a-format.md", "docs/accuracy.md"])
def test_accuracy(page):
    columns = {"perplexity": "wikipedia", "Wikipedia": "wikipedia", "State of the Union": "sotu"}
    columns |= {
        "LAMBADA": "lambada",
        "HellaSwag": "hellaswag",
        "ARC-Easy": "arc_easy",
        "ARC-Ch.": "arc_challenge",
    }
    columns |= {"PIQA": "piqa", "WinoG.": "winogrande"}
    found = table(page, "bits per weight", "kept, %")
    assert len(found) >= 7
    for name, cells in found.items():
        row = ACCURACY[ALIASES.get(name, name)]
        assert not row["bits_per_weight"] or is_rounded(cells["bits per weight"], row["bits_per_weight"])
        for column, task in columns.items():
            if cells.get(column):
                assert is_rounded(cells[column], score(row, task)), (name, column)
        if "±" in cells["kept, %"]:
            kept, error = cells["kept, %"].split(" ± ")
            assert is_rounded(kept, 100 * row["average_recovery"]), name
            assert is_rounded(error, 100 * row["average_recovery_stderr"]), name


def test_four_bits():
    rows = {(row["model"], row["method"]): row for row in results("four_bits.json")["rows"]}
    found = table("docs/refine.md", "weights", "Whisper base, KL", "bits per weight")
    assert len(found) == 15
    columns = {
        "Whisper base, KL": ("whisper", "kl"),
        "MiniLM, 1 - cosine": ("minilm", "distance"),
        "SmolLM2, KL": ("smollm2", "kl"),
        "SmolLM2, perplexity": ("smollm2", "perplexity"),
        "gemma, KL": ("gemma", "kl"),
        "gemma, perplexity": ("gemma", "perplexity"),
    }
    for name, cells in found.items():
        for column, (model, metric) in columns.items():
            if cells[column]:
                assert is_rounded(cells[column], rows[model, name][metric]), (name, column)
        if name != "float":
            assert is_rounded(cells["bits per weight"], rows["whisper", name]["bits_per_weight"]), name


def test_speech():
    rows = {row["method"]: row for row in results("four_bits.json")["rows"] if row["model"] == "whisper"}
    found = table("docs/models.md", "Whisper base", "words that differ, %")
    assert len(found) == 6
    for name, cells in found.items():
        row = rows[name]
        assert is_rounded(cells["bits per weight"], row["bits_per_weight"])
        assert is_rounded(cells["words that differ, %"], 100 * row["word_errors"]), name
        assert is_rounded(cells["divergence"], row["kl"]), name


def test_peers_at_four_bits():
    rows = {(row["model"], row["method"]): row for row in results("four_bits.json")["rows"]}
    found = table("docs/refine.md", "method", "data", "Whisper base, KL")
    names = {"HQQ": "hqq", "SINQ": "sinq", "GPTQ": "gptq", "AWQ": "awq"}
    names |= {"auto-round, rounding only": "auto-round-rtn", "auto-round, 50 iterations": "auto-round"}
    columns = {
        "Whisper base, KL": ("whisper", "kl"),
        "MiniLM, 1 - cosine": ("minilm", "distance"),
        "SmolLM2, KL": ("smollm2", "kl"),
        "SmolLM2, perplexity": ("smollm2", "perplexity"),
    }
    for name, cells in found.items():
        for column, (model, metric) in columns.items():
            if cells[column]:
                method = names.get(name, names.get(name.split(",")[0].split(" (")[0], name))
                assert is_rounded(cells[column], rows[model, method][metric]), (name, column)
    assert len(found) >= 4


def test_int8_activations():
    rows = {(row["model"], row["weights"]): row for row in results("int8_activations.json")["rows"]}
    models = {
        "SmolLM2-135M-Instruct": "smollm2",
        "gemma-3-270m": "gemma",
        "Whisper base": "whisper",
        "MiniLM": "minilm",
    }
    metrics = {
        "nats per token": "kl",
        "1 - cosine of embeddings": "distance",
        "perplexity before": "perplexity_before",
        "perplexity after": "perplexity",
    }
    found = table("docs/choose-a-format.md", "int8 activations move")
    for name, (_, *cells) in ((name, row.values()) for name, row in found.items()):
        model, metric = name.split(", ")
        for weights, cell in zip(("int4 g64", "int8 g128"), cells, strict=True):
            assert is_rounded(cell, rows[models[model], weights][metrics[metric]]), (name, weights)
    assert len(found) == 8


def test_gptq_checkpoint():
    rows = results("gptq_checkpoint.json")["rows"]
    (found,) = (t for t in tables("docs/formats.md") if t[0][:2] == ["dtype", "engine"])
    assert len(found) == len(rows) + 1
    for (dtype, engine, prefill, decode), row in zip(found[1:], rows, strict=True):
        assert (dtype, engine) == (row["dtype"], row["engine"])
        assert is_rounded(prefill, row["prefill"]), engine
        assert is_rounded(decode, row["decode"]), engine


def test_selective():
    rows = results("selective.json")["rows"]
    found = table("docs/selective-precision.md", "weights", "bits per weight", "divergence")
    found = {name.removesuffix(" at int8 g64"): cells for name, cells in found.items()}
    assert set(found) == set(rows)
    for name, cells in found.items():
        assert is_rounded(cells["perplexity"], rows[name]["perplexity"]), name
        assert is_rounded(cells["divergence"], rows[name]["divergence"]), name
        assert is_rounded(cells["bits per weight"], rows[name].get("bits_per_weight", 16)), name


KERNELS = {
    "&nbsp; int8 activations": "rtn int4 g128, int8 activations",
    "&nbsp; OpenVINO (int8 activations)": "OpenVINO",
    "&nbsp; ONNX Runtime (int8 activations)": "ONNX Runtime",
    "&nbsp; OpenVINO, bf16 activations": "OpenVINO, bf16 activations",
    "&nbsp; torch's int4": "aten int4 g128",
    "&nbsp; int8 weights": "rtn int8 g128",
    "&nbsp; int8 weights and activations": "rtn int8 g128, int8 activations",
}


@pytest.mark.parametrize(
    ("file", "heading"), [("cpu_linear.json", "weight"), ("cpu_linear_amx.json", "weight, with AMX")]
)
def test_a_layer_on_a_cpu(file, heading):
    rows = results(file)["rows"]
    found = next(rows for rows in tables("docs/speed.md") if rows[0][:2] == [heading, "1"])
    names, shape = found[0][1:], ""
    for name, *cells in found[1:]:
        kernel = KERNELS.get(name, "rtn int4 g128")
        shape = name if name.startswith("[") else shape
        over = {
            str(r["M"]): r["over_dense"]
            for r in rows
            if r["kernel"] == kernel and f"[{r['N']}, {r['K']}]" == shape
        }
        assert all(is_rounded(cell, over[m]) for m, cell in zip(names, cells, strict=True)), (shape, kernel)


@pytest.mark.parametrize("page", ["README.md", "docs/choose-a-format.md", "docs/speed.md"])
def test_a_model_on_a_cpu(page):
    rows = {(row["weights"], row["what"]): row for row in results("cpu_model.json")["rows"]}
    columns = {
        "prefill of 512, eager": "prefill eager",
        "decode, eager": "decode eager",
        "tokens per second": "decode compiled",
    }
    columns |= {
        "decoding, tokens per second": "decode compiled",
        "prefill of 512, tokens per second": "prefill compiled",
    }
    checked = 0
    for rows_of_page in tables(page):
        for name, *cells in rows_of_page[1:]:
            weights = {"bf16": "bf16"}.get(name, ALIASES.get(name, name).replace(", group_size ", " g"))
            weights = {"int4 g32 search": "int4 g32", "int4 g32 absmax": "int4 g32"}.get(weights, weights)
            for column, cell in zip(rows_of_page[0][1:], cells, strict=True):
                if column in columns and cell and (weights, columns[column]) in rows:
                    row = rows[weights, columns[column]]
                    ours, _, over = cell.partition(" (")
                    assert is_rounded(ours, row["ours"]), (name, column)
                    assert not over or is_rounded(over.strip(")"), row["ours"] / row["llama.cpp"]), (
                        name,
                        column,
                    )
                    checked += 1
    assert checked >= 3


def test_a_model_with_int8_activations_on_a_cpu():
    rows = {(row["weights"], row["what"]): row["ours"] for row in results("cpu_model_int8.json")["rows"]}
    found = [rows for rows in tables("docs/speed.md") if rows[0][0] == "tokens per second, compiled"]
    for name, *cells in found[0][1:]:
        kinds = [(weights, what) for what in ("prefill", "decode") for weights in ("", ", int8 activations")]
        for (more, what), cell in zip(kinds, cells, strict=True):
            assert is_rounded(cell, rows[name + more, f"{what} compiled"]), (name, what)


def test_loading():
    rows = {row["way"]: row for row in results("load.json")["rows"]}
    ways = {"`load`, int4": "rtn_tensor.load int4", "`load`, int8": "rtn_tensor.load int8"}
    ways |= {
        "transformers, `TorchAoConfig` with the same int4": "transformers, rtn_int4",
        "transformers, torchao's int8": "transformers, torchao int8",
    }
    found = table("docs/load-and-save.md", "seconds, cached")
    for name, way in ways.items():
        assert is_rounded(found[name]["seconds, cached"], rows[way]["seconds"]), name
        assert is_rounded(found[name]["seconds, disk"], rows[f"{way}, disk"]["seconds"]), name
        assert is_rounded(found[name]["MB at most"].partition(" to ")[0], rows[way]["peak"] / 1e6), name


def test_serving():
    rows = {(row["weights"], row["batch"]): row["seconds"] for row in results("serving-cpu.json")["rows"]}
    for name, cells in table("docs/serving.md", "1 prompt", "4 prompts").items():
        weights = "int4 by vLLM (GPTQ)" if "vLLM" in name else name
        assert is_rounded(cells["1 prompt"], rows[weights, 1]), name
        assert is_rounded(cells["4 prompts"], rows[weights, 4]), name


UNDER_LOAD = sorted((ROOT / "benchmarks/results").glob("serving-load*.json"))


@pytest.mark.parametrize("path", UNDER_LOAD, ids=lambda path: path.stem)
def test_serving_under_load(path):
    """The page has what `benchmarks/serving_load.py` printed."""
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    for table in markdown(json.loads(path.read_text())).split("\n\n"):
        assert table in page


def test_experts():
    rows = results("moe.json")["rows"]
    peers = {
        "int4, group_size 128": "rtn int4 g128",
        "int8, group_size 128": "rtn int8 g128",
        "torchao's int8": "torchao int8",
    }
    found = table("docs/mixture-of-experts.md", "16", "MB of weights")
    for name, cells in found.items():
        layer = "Mixtral-8x7B" if name.startswith("Mixtral") else "Qwen3-30B-A3B"
        short = name.removeprefix("Mixtral: ")
        peer = peers.get(short, short.replace(", `", " ").replace("`", ""))
        over = {
            str(row["tokens"]): row["over_bf16"]
            for row in rows
            if row["layer"] == layer and row["peer"] == peer and "over_bf16" in row
        }
        assert over, (layer, peer)
        assert all(is_rounded(cell, over[m]) for m, cell in cells.items() if m in over and cell), name


def test_embeddings():
    header = ("1 - cosine", "of the first ten found, %", "64 sentences, ms", "one query, ms")
    page = table("docs/models.md", *header)
    rows = {row["name"]: row for row in results("embeddings.json")["rows"]}
    assert page.keys() == rows.keys()
    for name, row in rows.items():
        values = (row["distance"], 100 * row["found"], row["batch"], row["query"])
        for column, value in zip(header, values, strict=True):
            assert is_rounded(page[name][column], value), (name, column)
