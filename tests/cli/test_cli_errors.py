"""What the commands say of mistakes."""

import sys

import pytest
from expecttest import assert_expected_inline
from tiny_llama import tiny_llama

from rtn_tensor.cli import main


@pytest.fixture(autouse=True)
def _own_choice_of_kernel(monkeypatch):
    monkeypatch.delenv("RTN_KERNEL", raising=False)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["quantize", "{missing}", "{new}"],
            "{missing} is not a model folder: it is not there; a model of the hub has a name as in "
            "Qwen/Qwen3-0.6B",
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
            "'*.up_proj=six' is no rule; write PATTERN=BITS, PATTERN=BITS,GROUP_SIZE,SCALE_METHOD,ACTIVATIONS or "
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
        (
            ["inspect", "{empty}"],
            "{empty} is not a model folder: it has no config.json; add its model's, or give load() the module to fill, as model=",
        ),
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
