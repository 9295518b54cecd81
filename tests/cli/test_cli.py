import json
import os
import re
import subprocess
import sys

import pytest
import torch
from expecttest import assert_expected_inline
from safetensors import safe_open
from tiny_llama import TEXT, tiny_tokenizer
from tiny_model import formats

from rtn_tensor import load, quantize_, report, rtn_int4, set_activations_
from rtn_tensor.evaluation.generation import generate
from rtn_tensor.evaluation.perplexity import perplexity
from rtn_tensor.kernels import cpu

# What `source` holds in vain.
LEFT_OUT = """\
Left out figures/: neither modules.json names it nor does it hold a tokenizer, a processor or templates alone
Left out pytorch_model.bin: weights that are not quantized
"""


@pytest.fixture(autouse=True)
def _own_choice_of_kernel(monkeypatch):
    monkeypatch.delenv("RTN_KERNEL", raising=False)


# -------------------------------------------------------------------- quantize and inspect


def test_quantize(run, source, tmp_path):
    destination = tmp_path / "out"
    status, out, err = run(
        "quantize",
        source,
        destination,
        "--bits",
        8,
        "--group-size",
        64,
        "--scale-method",
        "signed",
        "--verbose",
    )
    assert status == 0
    sizes = "357.3 kB -> 215.9 kB, 9.67 bits per weight"
    assert err == f"Loading {source}: {sizes}\nWriting {destination}\n{LEFT_OUT}"
    assert_expected_inline(
        out,
        """\
weight                                     shape   bits  group  bytes before  bytes after  note
--------------------------------------  --------  -----  -----  ------------  -----------  -------------------------------------
model.embed_tokens.weight               320 x 96  float               61,440       61,440  not selected
model.layers.0.self_attn.q_proj.weight   96 x 96      8     64        18,432        9,600
model.layers.0.self_attn.k_proj.weight   48 x 96      8     64         9,216        4,800
model.layers.0.self_attn.v_proj.weight   48 x 96      8     64         9,216        4,800
model.layers.0.self_attn.o_proj.weight   96 x 96      8     64        18,432        9,600
model.layers.0.mlp.gate_proj.weight     160 x 96      8     64        30,720       16,000
model.layers.0.mlp.up_proj.weight       160 x 96      8     64        30,720       16,000
model.layers.0.mlp.down_proj.weight     96 x 160      8     64        30,720       15,936
model.layers.1.self_attn.q_proj.weight   96 x 96      8     64        18,432        9,600
model.layers.1.self_attn.k_proj.weight   48 x 96      8     64         9,216        4,800
model.layers.1.self_attn.v_proj.weight   48 x 96      8     64         9,216        4,800
model.layers.1.self_attn.o_proj.weight   96 x 96      8     64        18,432        9,600
model.layers.1.mlp.gate_proj.weight     160 x 96      8     64        30,720       16,000
model.layers.1.mlp.up_proj.weight       160 x 96      8     64        30,720       16,000
model.layers.1.mlp.down_proj.weight     96 x 160      8     64        30,720       15,936
lm_head.weight                          320 x 96  float                    0            0  shared with model.embed_tokens.weight
5 vectors                                         float                  960          960  norms and biases
total                                              9.67              357,312      215,872
""",
    )
    model = load(destination)
    assert set(formats(model).values()) == {(8, 64)}
    assert model.model.layers[0].mlp.up_proj.weight.scale_method == "signed"
    assert sorted(path.name for path in destination.iterdir()) == sorted(
        {path.name for path in source.iterdir()} - {"pytorch_model.bin", "figures"}
        | {"README.md", "rtn_recipe.yaml"}
    )
    assert (destination / "LICENSE").read_text() == "free"


def test_quantize_defaults(run, source, tmp_path):
    status, out, _ = run("quantize", source, tmp_path / "out", "--json")
    assert status == 0
    as_dict = json.loads(out)
    expected = load(source)
    selected = [
        name
        for name, module in expected.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    assert as_dict == quantize_(expected, rtn_int4(), lambda module, fqn: fqn in selected).to_dict()
    assert as_dict["bytes_after"] < as_dict["bytes_before"]


def test_quantize_skips(run, source, tmp_path):
    skip = ["--skip", "model.layers.0.*", "--skip", "*.k_proj"]
    assert run("quantize", source, tmp_path / "out", *skip)[0] == 0
    kept = [
        "self_attn.q_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    assert list(formats(load(tmp_path / "out"))) == [f"model.layers.1.{name}.weight" for name in kept]


def test_int8_activations(run, source, quantized, tmp_path):
    """As a folder is quantized with them, and where one is used that says nothing of them."""
    status, out, _ = run("quantize", source, tmp_path / "q", "--bits", 8, "--activations", "int8")
    assert status == 0
    assert out.count("int8 activations") == 7
    weights = [w for w in load(tmp_path / "q").parameters() if hasattr(w, "bits")]
    assert {w.activations for w in weights} == {"int8"}
    text = quantized.parent / "text.txt"
    ids = torch.tensor(tiny_tokenizer()(TEXT)["input_ids"])
    model = load(quantized)
    before = perplexity(model, ids)
    set_activations_(model, "int8")
    status, out, _ = run("perplexity", quantized, "--text", text, "--activations", "int8", "--json")
    assert json.loads(out)["perplexity"] == perplexity(model, ids) != before
    status, out, _ = run("explain", "--activations", "int8")
    assert "int8 activations" in out


def test_quantize_by_rules(run, source, tmp_path):
    (tmp_path / "rules.json").write_text(
        '[["*.o_proj", {"bits": 8, "scale_method": "absmax"}], ["*.k_proj", null]]'
    )
    rules = [
        "--skip",
        "*.1.mlp.up_proj",
        "--rule",
        "model.layers.0.*=8",
        "--rule",
        "*down_proj=8,32,absmax",
        "--rules",
        tmp_path / "rules.json",
    ]
    assert (
        run("quantize", source, tmp_path / "out", *rules, "--group-size", 64, "--scale-method", "signed")[0]
        == 0
    )
    model = load(tmp_path / "out")
    found = {
        name.removesuffix(".weight"): (w.bits, w.group_size, w.scale_method)
        for name, w in model.named_parameters()
        if hasattr(w, "bits")
    }
    kinds = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    expected = {f"model.layers.0.{kind}": (8, 64, "signed") for kind in kinds}
    expected |= {
        f"model.layers.1.{kind}": (4, 64, "signed")
        for kind in kinds
        if kind not in ("self_attn.k_proj", "mlp.up_proj")
    }
    expected |= {
        "model.layers.1.self_attn.o_proj": (8, 64, "absmax"),
        "model.layers.1.mlp.down_proj": (8, 32, "absmax"),
    }
    assert found == expected


def test_quantize_embedding(run, source, tmp_path):
    assert run("quantize", source, tmp_path / "out", "--embedding", "--group-size", 32)[0] == 0
    model = load(tmp_path / "out")
    assert len(formats(model)) == 16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "lm_head._weight_qdata" not in file.keys()


def test_quantize_replaces_by_force(run, source, tmp_path):
    out = tmp_path / "out"
    assert run("quantize", source, out)[0] == 0
    (out / "old").write_text("")
    assert run("quantize", source, out, "--force", "--bits", 8)[0] == 0
    assert set(formats(load(out)).values()) == {(8, 128)}
    assert not (out / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_inspect(run, quantized):
    status, out, err = run("inspect", quantized)
    assert (status, err) == (0, f"Loading {quantized}\n")
    assert_expected_inline(
        out,
        """\
layers        count   bits  group     before      after  note
------------  -----  -----  -----  ---------  ---------  -------------------------------------
embed_tokens      1  float           61.4 kB    61.4 kB  not selected
q_proj            2      4     64    36.9 kB    10.0 kB
k_proj            2      4     64    18.4 kB     5.0 kB
v_proj            2      4     64    18.4 kB     5.0 kB
o_proj            2      4     64    36.9 kB    10.0 kB
gate_proj         2      4     64    61.4 kB    16.6 kB
up_proj           2      4     64    61.4 kB    16.6 kB
down_proj         2      4     64    61.4 kB    16.5 kB
lm_head           1  float           0 bytes    0 bytes  shared with model.embed_tokens.weight
vectors           5  float         960 bytes  960 bytes  norms and biases
total            21   6.37          357.3 kB   142.1 kB
""",
    )
    status, out, _ = run("inspect", quantized, "--verbose")
    assert out == f"{report(load(quantized))}\n"
    status, out, _ = run("inspect", quantized, "--json")
    assert status == 0
    assert json.loads(out) == report(load(quantized)).to_dict()


def test_inspect_a_float_model(run, source):
    status, out, _ = run("inspect", source, "--json")
    assert status == 0
    assert json.loads(out)["bits_per_weight"] == 16


# ----------------------------------------------------------- perplexity, generate, explain


def test_perplexity(run, quantized):
    text = quantized.parent / "text.txt"
    model, ids = load(quantized), torch.tensor(tiny_tokenizer()(TEXT)["input_ids"])
    status, out, err = run("perplexity", quantized, "--text", text)
    assert (status, out, err) == (0, f"{perplexity(model, ids):.3f}\n", f"Loading {quantized}\n")
    status, out, _ = run(
        "perplexity", quantized, "--text", text, "--window", 16, "--stride", 8, "--max-tokens", 30, "--json"
    )
    assert status == 0
    assert json.loads(out) == {
        "perplexity": perplexity(model, ids[:30], 16, 8),
        "tokens": 30,
        "window": 16,
        "stride": 8,
    }


def test_evaluate_a_text(run, source, quantized):
    text = quantized.parent / "text.txt"
    ids = torch.tensor(tiny_tokenizer()(TEXT)["input_ids"])
    value, reference = (perplexity(load(folder), ids) for folder in (quantized, source))
    status, out, _ = run(
        "evaluate", quantized, "--tasks", "perplexity", "--text", text, "--against", source, "--json"
    )
    assert status == 0
    result = json.loads(out, parse_constant=pytest.fail)  # NaN is Python's own
    assert result["average_recovery"] is None  # there is no accuracy
    (row,) = result["scores"]
    assert (row["task"], row["metric"], row["n"]) == ("perplexity", "perplexity", ids.numel() - 1)
    assert (row["value"], row["reference"]) == (pytest.approx(value), pytest.approx(reference))
    assert row["recovery"] == pytest.approx(reference / value)
    status, out, _ = run("evaluate", quantized, "--tasks", "perplexity", "--text", text)
    assert status == 0
    assert out.splitlines()[0].split() == ["task", "metric", "n", "value"]
    assert f"{value:.2f}" in out
    assert run("evaluate", quantized, "--tasks", "perplexity")[::2] == (
        1,
        "rtn-tensor: error: the task perplexity and --text FILE go together; add the one that is missing\n",
    )


@pytest.mark.filterwarnings("default")  # the harness's own
def test_evaluate_a_task(run, source, quantized):
    pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not installed; pip install 'rtn-tensor[evaluate]'"
    )
    words = TEXT.split()
    (source.parent / "lambada.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(words[: i + 3])}) + "\n" for i in range(6))
    )
    options = ("--tasks", "lambada", "--data", source.parent, "--limit", 4)
    status, out, _ = run("evaluate", quantized, "--against", source, *options, "--json")
    assert status == 0
    assert [(row["task"], row["metric"], row["n"]) for row in json.loads(out)["scores"]] == [
        ("lambada", "acc", 4),
        ("lambada", "perplexity", 4),
    ]
    status, out, _ = run("evaluate", quantized, *options)
    assert status == 0
    assert [line.split()[:3] for line in out.splitlines()[2:]] == [
        ["lambada", "acc", "4"],
        ["lambada", "perplexity", "4"],
    ]


def test_generate(run, quantized):
    expected = generate(load(quantized), tiny_tokenizer(), "We the people", 6)
    status, out, err = run("generate", quantized, "We the people", "--max-new-tokens", 6)
    assert (status, out) == (0, f"{expected.text}\n")
    said = rf"Loading {quantized}\n6 tokens in \d+\.\d s, [\d.]+ tokens per second\n"
    assert re.fullmatch(said, err)
    status, out, _ = run("generate", quantized, "We the people", "--max-new-tokens", 6, "--json")
    assert status == 0
    as_dict = json.loads(out)
    assert as_dict.pop("seconds") > 0
    assert as_dict == {"text": expected.text, "tokens": 6}


def test_explain(run, monkeypatch):
    monkeypatch.setenv("RTN_KERNEL", "reference")
    status, out, err = run(
        "explain", "--m", 3, "--n", 64, "--k", 100, "--bits", 8, "--group-size", 32, "--dtype", "float16"
    )
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "linear on cpu: torch.float16 x [3, 100], int8 weight [64, 100] with group_size 32"
    assert lines[-1].split() == ["reference", "runs"]
    status, out, _ = run("explain", "--op", "embedding", "--json")
    assert status == 0
    as_dict = json.loads(out)
    assert as_dict["kernel"] == "reference"
    assert as_dict["problem"]["op"] == "embedding"


# ----------------------------------------------------------------------- as a user runs it


def shell(command, **names):
    """Runs `command` in a shell where `rtn` is the command line in a process of its own."""
    env = (
        os.environ
        | {"RTN": f"{sys.executable} -m rtn_tensor", "COLUMNS": "100"}
        | {name: str(value) for name, value in names.items()}
    )
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env)


no_warning = pytest.mark.skipif(
    not cpu.LIBRARY.exists(), reason="without the C++ library there is a warning, too"
)


@no_warning
def test_processes_are_clean(source, tmp_path):
    done = shell(
        "$RTN quantize $SOURCE $OUT --group-size 64 && $RTN generate $OUT 'We the people'",
        SOURCE=source,
        OUT=tmp_path / "out",
    )
    assert done.returncode == 0
    out = tmp_path / "out"
    loading = f"Loading {source}: 357.3 kB -> 142.1 kB, 6.37 bits per weight"
    said = f"{loading}\nWriting {out}\n{LEFT_OUT}Loading {out}\n"
    assert done.stderr.startswith(said)
    assert re.fullmatch(r"64 tokens in .* s, .* tokens per second\n", done.stderr.removeprefix(said))
    assert done.stdout.startswith("layers ")


def test_a_mistake_is_one_line(tmp_path):
    done = shell("$RTN inspect $MISSING", MISSING=tmp_path / "missing")
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr == f"rtn-tensor: error: {tmp_path}/missing is not a model "
        "folder: it is not there; "
        "a model of the hub has a name as in Qwen/Qwen3-0.6B\n"
    )


@no_warning
def test_a_closed_pipe_is_quiet():
    done = shell("set -o pipefail; $RTN explain | true; echo ${PIPESTATUS[0]}")
    assert (done.stdout, done.stderr) == ("0\n", "")
