"""benchmarks/moe.py runs, checks its peers, and says what it measured; how fast anything is, no test
asserts."""

import json
import warnings

import pytest
import torch
from expecttest import assert_expected_inline

from benchmarks import moe

TINY = moe.Layer("Tiny", "mixtral", 4, 64, 96, 2, torch.float32)
TINY_QWEN = TINY._replace(model="Tiny Qwen3", kind="qwen3_moe", experts=8, router=torch.bfloat16)
EAGER = [name for name in moe.PEERS if "compiled" not in name]


def test_layers_are_those_of_the_models():
    for layer, size in (("qwen3-30b-a3b", 128 * 3 * 2048 * 768), ("mixtral", 8 * 3 * 4096 * 14336)):
        with torch.device("meta"):
            weights = moe.random_weights(moe.LAYERS[layer])
        assert sum(w.numel() for w in weights.values()) == size


@pytest.mark.parametrize("layer", [TINY, TINY_QWEN], ids=["mixtral", "qwen3"])
def test_every_peer_is_measured_at_every_size(layer):
    rows = moe.measure(layer, [1, 3], 2, EAGER)
    assert sorted((r["peer"], r["tokens"]) for r in rows) == sorted(
        (name, t) for name in EAGER for t in (1, 3)
    )
    for row in rows:
        assert row["layer"] == layer.model
        assert row["seconds"] > 0
        assert row["over_bf16"] > 0
        assert row["best_bf16"].startswith("bf16")
        assert row["extra_bytes"] >= 0
        assert row["error"] < 0.02 if "bf16" in row["peer"] else row["error"] > 0
    for t in (1, 3):
        assert 1.0 in {r["over_bf16"] for r in rows if r["tokens"] == t and r["peer"] == r["best_bf16"]}
    count = layer.experts * 3 * 64 * 96
    sizes = {r["peer"]: r["weights_bytes"] for r in rows}
    assert sizes["bf16 eager"] == 2 * count
    # Rows of less than 128: one scale each.
    assert sizes["rtn int4 g128"] == count // 2 + 2 * layer.experts * (2 * 96 + 64)
    assert sizes["rtn int8 g128"] == count + 2 * layer.experts * (2 * 96 + 64)


def test_routings_use_the_experts_in_turn():
    layer = TINY._replace(experts=16, top_k=4)
    one = moe.routings(layer, 1, 4)
    assert torch.stack(one).flatten().sort().values.tolist() == list(range(16))
    for routing in moe.routings(layer, 5, 3):
        assert routing.shape == (5, 4)
        assert all(len(set(experts)) == 4 and set(experts) <= set(range(16)) for experts in routing.tolist())


def test_extra_memory_is_what_a_call_takes():
    def call():
        between = torch.ones(64 << 18)
        return between[: 16 << 18].clone()

    assert moe.extra_memory(call) == pytest.approx(80 << 20, rel=0.05)


def test_a_wrong_peer_is_found(monkeypatch):
    monkeypatch.setitem(
        moe.PEERS, "rtn int8 g128", lambda layer, weights: moe.bf16("eager", layer, moe.random_weights(layer))
    )
    with pytest.raises(
        RuntimeError, match="rtn int8 g128 is wrong: its output is off by .* of bf16's, and 0.03 is what"
    ):
        moe.measure(TINY, [2], 1, EAGER)


def test_what_cannot_run_is_said(monkeypatch):
    def missing(layer, weights):
        raise NotImplementedError("no bmm\nand more")

    monkeypatch.setitem(moe.PEERS, "torchao int8", missing)
    monkeypatch.setattr(moe, "MOST_COPIED", 2 * 2 * 3 * 64 * 96 * 2)
    rows = moe.measure(TINY, [2, 3], 1, EAGER)
    said = {(r["peer"], r["tokens"]): r.get("failed") or r["skipped"] for r in rows if "seconds" not in r}
    assert said == {
        ("torchao int8", 2): "NotImplementedError: no bmm",
        ("torchao int8", 3): "NotImplementedError: no bmm",
        ("bf16 batched_mm", 3): "would copy 0.0 GB of weights",
    }


def test_report():
    rows = []
    for t in (1, 16, 64):
        for peer, ms, size, extra in (
            ("bf16 eager", 50.0, 2819e6, 1e6),
            ("bf16 grouped_mm", 40.0, 2819e6, 3e6),
            ("rtn int4 g128", 10, 727e6, 0),
        ):
            error = 0.21 if "int4" in peer else 0.0
            row = {
                "layer": "Tiny",
                "tokens": t,
                "peer": peer,
                "seconds": ms * t / 1e3,
                "over_bf16": 40 / ms,
                "best_bf16": "bf16 grouped_mm",
            }
            rows.append(row | {"error": error, "weights_bytes": int(size), "extra_bytes": int(extra * t)})
        rows.append(
            {
                "layer": "Tiny",
                "tokens": t,
                "peer": "bf16 batched_mm",
                "skipped": f"would copy {t}.0 GB of weights",
            }
        )
        rows.append(
            {"layer": "Tiny", "tokens": t, "peer": "torchao int8", "failed": "NotImplementedError: no bmm"}
        )
    assert_expected_inline(
        moe.show(rows),
        """\
Times as fast as the best bf16, by tokens
peer              T=1  T=16  T=64
---------------  ----  ----  ----
bf16 eager       0.80  0.80  0.80
bf16 batched_mm     -     -     -
bf16 grouped_mm  1.00  1.00  1.00
rtn int4 g128    4.00  4.00  4.00
torchao int8        -     -     -
target of int4   2.50  1.50  1.00

Milliseconds a call
peer               T=1    T=16     T=64
---------------  -----  ------  -------
bf16 eager       50.00  800.00  3200.00
bf16 batched_mm      -       -        -
bf16 grouped_mm  40.00  640.00  2560.00
rtn int4 g128    10.00  160.00   640.00
torchao int8         -       -        -

The output's error against bf16 eager, at most; MB of the weights, and at most beside them in a call
peer             error  weights  T=1  T=16  T=64
---------------  -----  -------  ---  ----  ----
bf16 eager       0.000    2,819    1    16    64
bf16 batched_mm      -        -    -     -     -
bf16 grouped_mm  0.000    2,819    3    48   192
rtn int4 g128    0.210      727    0     0     0
torchao int8         -        -    -     -     -

bf16 batched_mm, T=1: would copy 1.0 GB of weights
torchao int8, T=1: NotImplementedError: no bmm
bf16 batched_mm, T=16: would copy 16.0 GB of weights
torchao int8, T=16: NotImplementedError: no bmm
bf16 batched_mm, T=64: would copy 64.0 GB of weights
torchao int8, T=64: NotImplementedError: no bmm""",
    )


def test_command_line(tmp_path, monkeypatch, capsys):
    """With the compiled peer."""
    monkeypatch.setitem(moe.LAYERS, "tiny", TINY)
    with warnings.catch_warnings():  # `main` filters them
        moe.main(
            [
                "--shapes",
                "tiny",
                "--tokens",
                "1,3",
                "--turns",
                "1",
                "--threads",
                "1",
                "--json",
                str(tmp_path / "moe.json"),
            ]
        )
    printed = capsys.readouterr().out
    assert "Tiny: 4 experts, 64 -> 96 -> 64, 2 a token" in printed
    assert all(f"\n{name} " in printed for name in [*moe.PEERS, "target of int4"])
    data = json.loads((tmp_path / "moe.json").read_text())
    assert sorted(data) == ["layers", "machine", "rows", "turns"]
    assert data["layers"] == {"Tiny": TINY._asdict() | {"router": "float32"}}
    assert {"cpu", "threads", "torch", "transformers", "torchao", "instruction_set"} <= data["machine"].keys()
    assert len(data["rows"]) == 2 * len(moe.PEERS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shapes", "mixtal"], "--shapes: 'mixtal' is none of qwen3-30b-a3b, mixtral"),
        (["--peers", "rtn int4 g128"], "ratios are to the best bf16, of which there is none"),
    ],
)
def test_arguments_that_make_no_sense(arguments, said, capsys):
    with pytest.raises(SystemExit):
        moe.main(arguments)
    assert said in capsys.readouterr().err
