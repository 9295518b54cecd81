"""The benchmarks run, and say what they measured; how fast anything is, no test asserts."""

import torch
from tiny_llama import tiny_llama

from benchmarks import cpu_linear, load, memory


def test_linear_measures_every_peer_at_every_size(capsys):
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
    ]
    assert [(r["kernel"], r["M"]) for r in rows] == [(name, m) for m in (1, 3) for name in names]
    assert all(r["seconds"] > 0 and r["over_dense"] > 0 for r in rows)
    assert {r["over_dense"] for r in rows if r["kernel"] == "dense"} == {1.0}
    cpu_linear.show(rows, read=1e9)
    assert "of the streaming read" in capsys.readouterr().out
    some = cpu_linear.measure(torch.bfloat16, 64, 128, [1], turns=1, only=["rtn int4 g32, 8-bit scales"])
    assert [r["kernel"] for r in some] == ["dense", "rtn int4 g32, 8-bit scales"]


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
