import json
import os
import subprocess
import sys

import pytest
import torch
from expecttest import assert_expected_inline
from safetensors import safe_open
from tiny_llama import TEXT, tiny_llama, tiny_tokenizer
from tiny_model import formats

from rtn_tensor import load, quantize_, report, rtn_int4
from rtn_tensor.cli import main
from rtn_tensor.evaluation.generation import generate
from rtn_tensor.evaluation.perplexity import perplexity
from rtn_tensor.kernels import cpu

# What `source` holds in vain.
LEFT_OUT = """\
Left out figures/: neither modules.json names it nor does it hold a tokenizer, a processor or templates alone
Left out pytorch_model.bin: weights that are not quantized
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A float model's folder with its tokenizer, a text, and what a download leaves behind."""
    folder = tmp_path_factory.mktemp("source") / "model"
    tiny_llama(tied=True, dtype=torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("free")
    (folder / "pytorch_model.bin").write_text("the weights once more")
    (folder / "figures").mkdir()
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def quantized(source):
    folder = source.parent / "quantized"
    assert main(["quantize", str(source), str(folder), "--group-size", "64"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _own_choice_of_kernel(monkeypatch):
    monkeypatch.delenv("RTN_KERNEL", raising=False)


# -------------------------------------------------------------------- quantize and inspect


def test_quantize(run, source, tmp_path):
    destination = tmp_path / "out"
    status, out, err = run(
        "quantize", source, destination, "--bits", 8, "--group-size", 64, "--scale-method", "signed"
    )
    assert status == 0
    assert err == f"Loading {source}\nWriting {destination}\n{LEFT_OUT}"
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
    assert (status, out, err) == (0, f"{expected.text}\n", f"Loading {quantized}\n")
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


# -------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["quantize", "{missing}", "{new}"],
            "{missing} is not a model folder: it is not there; a model of the hub is fetched by `hf download "
            "NAME --local-dir DIR`",
        ),
        (
            ["quantize", "{source}", "{source}"],
            "{source} exists; choose another name, or replace it with --force",
        ),
        (
            ["quantize", "{source}", "{source}", "--force"],
            "{source} is the model that is read; choose another name, as its other files are copied from "
            "there",
        ),
        (["quantize", "{quantized}", "{new}"], "{quantized} is already quantized; give the float model"),
        (
            ["quantize", "{source}", "{new}", "--group-size", "48"],
            "group_size=48 is not supported; use a multiple of 32 (32, 64 and 128 are usual), or -1 for one "
            "group per row",
        ),
        (
            ["quantize", "{source}", "{new}", "--rule", "*.up_proj=six"],
            "'*.up_proj=six' is no rule; write PATTERN=BITS, PATTERN=BITS,GROUP_SIZE,SCALE_METHOD or "
            "PATTERN=float",
        ),
        (
            ["quantize", "{source}", "{new}", "--rules", "{new}"],
            "cannot read {new} (No such file or directory); --rules takes a JSON file",
        ),
        (
            ["quantize", "{source}", "{new}", "--skip", "layers.0"],
            "the rule 'layers.0' matches no weight; nearest are 'model.layers.0.mlp.up_proj', "
            "'model.layers.0.mlp.gate_proj', "
            "'model.layers.0.mlp.down_proj', and * matches any text",
        ),
        (
            ["quantize", "{nan}", "{new}"],
            "{nan}/model.safetensors: model.layers.1.mlp.up_proj.weight holds NaN or inf; "
            "the checkpoint is damaged, copy or download it again",
        ),
        (["inspect", "{empty}"], "{empty} is not a model folder: it has no config.json"),
        (
            ["perplexity", "{source}", "--text", "{missing}"],
            "cannot read {missing} (No such file or directory); --text takes a UTF-8 text file",
        ),
        (
            ["perplexity", "{source}", "--text", "{binary}"],
            "cannot read {binary} (invalid start byte); --text takes a UTF-8 text file",
        ),
        (
            ["perplexity", "{source}", "--text", "{text}", "--stride", "0"],
            "stride=0 with window=1024; it must be at least 1 and at most window",
        ),
        (
            ["perplexity", "{source}", "--text", "{text}", "--max-tokens", "1"],
            "got 1 tokens and window=1024; both must be at least 2, as a token is scored given another",
        ),
        (["generate", "{source}", ""], "the prompt is empty; pass some text"),
        (["generate", "{source}", "We", "--max-new-tokens", "0"], "max_new_tokens=0; it must be at least 1"),
        (
            ["explain", "--op", "conv"],
            "op='conv' is not an op; use linear, linear_dx, grouped, grouped_dx, routed, embedding, quantize "
            "or dequantize",
        ),
    ],
)
def test_mistakes(run, source, quantized, tmp_path, command, message):
    (tmp_path / "empty").mkdir()
    names = {
        "source": source,
        "quantized": quantized,
        "text": source.parent / "text.txt",
        "nan": tmp_path / "nan",
    }
    names |= {name: tmp_path / name for name in ("missing", "new", "empty", "binary")}
    names["binary"].write_bytes(b"\xff\xfe")
    if "{nan}" in command:
        model = tiny_llama()
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
        model.save_pretrained(names["nan"])
    status, out, err = run(*(word.format(**names) for word in command))
    assert (status, out) == (1, "")
    # Only what it was doing may come before the error.
    lines = [line for line in err.splitlines() if not line.startswith("Loading ")]
    assert lines == [f"rtn-tensor: error: {message.format(**names)}"]
    assert not names["new"].exists()


def test_truncated_file(run, quantized, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in quantized.iterdir():
        (folder / file.name).write_bytes(file.read_bytes()[: 5000 if file.suffix == ".safetensors" else None])
    status, out, err = run("inspect", folder)
    assert (status, out) == (1, "")
    assert err.startswith(
        f"Loading {folder}\nrtn-tensor: error: {folder / 'model.safetensors'} is truncated or corrupt ("
    )
    assert err.endswith("; copy or download it again\n")
    assert err.count("\n") == 2


def test_no_tokenizer(run, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    status, out, err = run("generate", tmp_path / "model", "We")
    assert (status, out) == (1, "")
    why = f"{tmp_path / 'model'} has no tokenizer that can be read; copy the model's tokenizer files there"
    assert err.startswith(f"rtn-tensor: error: {why} (")
    assert err.count("\n") == 1


def test_missing_libraries(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    status, out, err = run("inspect", tmp_path)
    assert (status, out) == (1, "")
    assert_expected_inline(
        err,
        """\
rtn-tensor: error: import of transformers.utils halted; None in sys.modules; pip install 'rtn-tensor[cli]' brings it
""",
    )


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["compress"],
        ["quantize", "here"],
        ["quantize", "a", "b", "--bits", "3"],
        ["explain", "--dtype", "int8"],
        ["explain", "--device", "tpu"],
    ],
)
def test_usage(capsys, args):
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: rtn-tensor")
    assert "error: " in err.splitlines()[-1]


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
    assert done.stderr == f"Loading {source}\nWriting {out}\n{LEFT_OUT}Loading {out}\n"
    assert done.stdout.startswith("weight ")


def test_a_mistake_is_one_line(tmp_path):
    done = shell("$RTN inspect $MISSING", MISSING=tmp_path / "missing")
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr == f"rtn-tensor: error: {tmp_path}/missing is not a model "
        "folder: it is not there; "
        "a model of the hub is fetched by `hf download NAME --local-dir DIR`\n"
    )


@no_warning
def test_a_closed_pipe_is_quiet():
    done = shell("set -o pipefail; $RTN explain | true; echo ${PIPESTATUS[0]}")
    assert (done.stdout, done.stderr) == ("0\n", "")
