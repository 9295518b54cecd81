"""The benchmarks run, and say what they measured; how fast anything is, no test asserts."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_llama import tiny_llama

from benchmarks import bursts, cpu_linear, load, memory


@pytest.fixture
def few_weights(monkeypatch):
    monkeypatch.setattr(bursts, "CACHE_BYTES", 1 << 16)


def test_linear_measures_every_peer_at_every_size(few_weights, capsys):
    rows = cpu_linear.measure(torch.bfloat16, 64, 128, [1, 3], turns=1)
    names = [
        "dense",
        "rtn int4 g128",
        "rtn int4 g64",
        "rtn int4 g32",
        "rtn int4 g128, zero points",
        "rtn int4 g32, 8-bit scales",
        "rtn int8 g128",
        "aten int4 g128",
        "aten int8",
        "torchao int4 g128",
        "torchao int8",
        "rtn int8 g128, int8 activations",
        "rtn int4 g128, int8 activations",
    ]
    assert [(r["kernel"], r["M"]) for r in rows] == [(name, m) for m in (1, 3) for name in names]
    assert all(r["seconds"] > 0 and r["over_dense"] > 0 for r in rows)
    assert {r["over_dense"] for r in rows if r["kernel"] == "dense"} == {1.0}
    cpu_linear.show(rows, read=1e9)
    assert "of the streaming read" in capsys.readouterr().out
    some = cpu_linear.measure(torch.bfloat16, 64, 128, [1], turns=1, only=["rtn int4 g32, 8-bit scales"])
    assert [r["kernel"] for r in some] == ["dense", "rtn int4 g32, 8-bit scales"]


def test_linear_measures_engines_in_turn_with_ours(few_weights, tmp_path, monkeypatch, capsys):
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport sys\nprint(1.5, flush=True)\nfor line in sys.stdin:\n    print(2.5e-6 * int(line.split()[0]), flush=True)\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(cpu_linear, "REST", 0.0)
    options = {
        "--engines": python,
        "--shapes": "64x128",
        "--tokens": "1,3",
        "--turns": "1",
        "--json": tmp_path / "rows.json",
    }
    ours = "rtn int4 g128, int8 activations"
    only = [word for name in (ours, "OpenVINO", "ONNX Runtime") for word in ("--only", name)]
    monkeypatch.setattr(
        sys, "argv", ["", *(str(word) for option in options.items() for word in option), *only]
    )
    threads = torch.get_num_threads()
    try:
        cpu_linear.main()
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(r["kernel"], r["M"]) for r in rows] == [
        (name, m) for m in (1, 3) for name in ("dense", ours, "OpenVINO", "ONNX Runtime")
    ]
    for row in rows:
        assert row.get("version") == ("1.5" if row["kernel"][:2] in ("Op", "ON") else None)
        assert ("over_openvino" in row) == (row["kernel"] == ours)
        if row["kernel"] == "OpenVINO":
            assert row["seconds"] == row["least_seconds"] == 2.5e-6 * row["M"]
        if row["kernel"] == ours:
            assert row["over_openvino"] == pytest.approx(2.5e-6 * row["M"] / row["seconds"])
    assert "times as fast as OpenVINO" in capsys.readouterr().out


def test_engines_are_of_one_dtype(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "--engines", "python", "--dtypes", "bfloat16,float32"])
    with pytest.raises(SystemExit):
        cpu_linear.main()
    assert "--engines measures --dtypes bfloat16, not bfloat16,float32" in capsys.readouterr().err


@pytest.mark.parametrize("name", cpu_linear.ENGINES)
def test_an_engine_multiplies_and_is_timed(name):
    """In the interpreter that RTN_ENGINES names, or in this one if it has them."""
    python = os.environ.get("RTN_ENGINES", sys.executable)
    if python == sys.executable and not all(
        map(importlib.util.find_spec, ("openvino", "onnxruntime", "onnx"))
    ):
        pytest.skip("needs openvino, onnxruntime and onnx")
    script = Path(cpu_linear.__file__).with_name("linear_engines.py")
    done = subprocess.run(
        [python, script, name, "4096", "4096", "1"], input="1 0\n3 5\n", text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    version, *seconds = done.stdout.split("\n")[:-1]
    assert version[0].isdigit()
    assert len(seconds) == 2
    assert all(float(s) > 0 for s in seconds)


def test_load_measures_every_way(tmp_path):
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path)
    weights = {}
    for way in load.WAYS:
        result = load.measure(way, str(tmp_path))
        assert result["seconds"] > 0
        assert result["peak"] >= 0
        weights[way] = result["weights"]
    assert (
        weights["rtn_tensor.load int4"] == weights["transformers, rtn_int4"] < weights["rtn_tensor.load int8"]
    )
    assert load.sequential_read(tmp_path) > 0


def test_memory_is_sampled_while_a_model_loads(tmp_path):
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path)
    found = [memory.measure(way, str(tmp_path)) for way in memory.WAYS]
    assert all(row["seconds"] > 0 and row["samples"] for row in found)
    assert len({row["weights"] for row in found}) == 1  # the same weights are quantized
