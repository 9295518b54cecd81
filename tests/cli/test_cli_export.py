"""`rtn-tensor export`, and `rtn-tensor quantize --format`."""

import json

import pytest
import torch
from file_tree import tree
from tiny_gguf import write_like
from tiny_llama import tiny_llama
from transformers import AutoModelForCausalLM

from rtn_tensor.cli import main


def run(capsys, *args):
    status = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def like(source):
    return write_like(source.parent / "like.gguf", AutoModelForCausalLM.from_pretrained(source))


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "gguf"])
def test_in_one_go_or_in_two(source, quantized, like, tmp_path, capsys, name):
    arguments = ["--format", name, *(["--like", like] if name == "gguf" else [])]
    one, two = (tmp_path / part / f"model{'.gguf' if name == 'gguf' else ''}" for part in ("one", "two"))
    status, out, err = run(capsys, "quantize", source, one, "--group-size", 64, *arguments)
    assert status == 0, err
    assert " reads it" in out
    assert f"Writing {one}" in err
    status, again, err = run(capsys, "export", quantized, two, *arguments)
    assert (status, again) == (0, out)
    if name == "gguf":
        assert one.read_bytes() == two.read_bytes()
        return
    for file in ("model.safetensors", "config.json", "tokenizer.json", "LICENSE", "README.md"):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
    assert {"quantize_config.json"} & {file.name for file in one.iterdir()} == (
        {"quantize_config.json"} if name == "gptq" else set()
    )
    assert json.loads((one / "config.json").read_text())["quantization_config"]["quant_method"] == name
    assert not (one / "pytorch_model.bin").exists()


def test_json(quantized, tmp_path, capsys):
    status, out, _ = run(capsys, "export", quantized, tmp_path / "a", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["format"] == "compressed-tensors"
    assert found["engines"][0] == "vLLM 0.32 reads it."
    assert found["changes"] == [
        "Groups of 64 are written as groups of 32, the scale of each several times (14 weights)."
    ]
    row = next(row for row in found["weights"] if row["name"] == "model.layers.0.mlp.up_proj.weight")
    assert (row["bits"], row["group_size"]) == (4, 32)


def test_refined(source, tmp_path, capsys):
    arguments = ["--refine", "--refine-on", source.parent / "long.txt", "--format", "gptq"]
    (source.parent / "long.txt").write_text((source.parent / "text.txt").read_text() * 20)
    status, out, err = run(capsys, "quantize", source, tmp_path / "a", "--group-size", 32, *arguments)
    assert status == 0, err
    assert "refined on" in out
    assert "reads it" in out


def test_mistakes(source, quantized, like, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("precious")
    cases = [
        (
            ("export", source, "a"),
            f"{source} is float; `rtn-tensor quantize {source} a --format compressed-tensors`",
        ),
        (("export", quantized, "there"), "there exists; choose another name, or replace it with --force"),
        (("export", quantized, "there", "--force"), "only a model's folder is replaced"),
        (
            ("export", quantized, "a", "--format", "gguf"),
            "format='gguf' needs like, a GGUF file of the same model",
        ),
        (("export", quantized, "a", "--format", "gguf", "--like", like), "a does not end in .gguf"),
        (("export", quantized, "a.gguf", "--format", "gguf", "--like", "none"), "none is not there"),
        (("export", quantized, "a", "--like", like), "is for format='gguf'"),
        (("export", "none", "a"), "none is not a model folder: it is not there"),
        (("export", quantized, quantized, "--force"), "is the model that is read; choose another name"),
        (
            ("quantize", source, "a", "--like", like),
            "--like FILE is for --format gguf; add that, or leave it out",
        ),
        (("quantize", source, "a.gguf", "--format", "gptq"), "a.gguf is named as a file is"),
        (
            ("quantize", source, "there", "--format", "gptq"),
            "there exists; choose another name, or replace it",
        ),
    ]
    before = tree(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for args, why in cases:
            status, out, err = run(capsys, *args)
            assert (status, out) == (1, ""), args
            assert why in err.splitlines()[-1], (args, err)
    assert tree(tmp_path) == before
    with pytest.raises(SystemExit) as caught:
        main(["export", str(quantized), str(tmp_path / "a"), "--format", "awq"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("name", "layer", "options"),
    [
        ("gptq", "self_attn.q_proj", ["--scale-method", "minmax"]),
        ("gptq", "self_attn.q_proj", ["--scheme", "W4A16_ASYM", "--dry-run"]),
        ("gptq", "mlp.down_proj", ["--rule", "*.down_proj=4,32,minmax", "--bits-per-weight", "5"]),
        ("gguf", "self_attn.q_proj", ["--scale-method", "minmax"]),
    ],
)
def test_zero_points_are_refused_before_the_weights_are_read(
    source, like, tmp_path, capsys, name, layer, options
):
    place = ["a.gguf", "--like", like] if name == "gguf" else ["a"]
    status, out, err = run(
        capsys, "quantize", source, tmp_path / place[0], "--format", name, *place[1:], *options
    )
    assert (status, out) == (1, "")
    (line,) = err.splitlines()  # and none of loading
    assert f"--format {name}: model.layers.0.{layer}.weight has a plane 'zero'" in line
    assert "use compressed-tensors, or a symmetric scale_method, as 'signed'" in line
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_leaves_nothing(tmp_path, capsys):
    """A weight is named, whose groups no engine has."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=1000, num_hidden_layers=1, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    status, _, err = run(
        capsys, "quantize", tmp_path / "model", tmp_path / "a", "--format", "compressed-tensors"
    )
    assert status == 1
    assert "model.layers.0.mlp.down_proj: K = 1000 and group_size 64 share only 8" in err.splitlines()[-1]
    assert "Loading" not in err.replace("Loading weights", "")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_force(quantized, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "a")
    assert run(capsys, "export", quantized, tmp_path / "a", "--force")[0] == 0
    assert "compressed-tensors" in (tmp_path / "a" / "config.json").read_text()


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
def test_what_was_exported_is_read_and_exported_again(quantized, tmp_path, capsys, name):
    for source, folder in ((quantized, "first"), (tmp_path / "first", "second")):
        status, _, err = run(capsys, "export", source, tmp_path / folder, "--format", name)
        assert status == 0, err
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert "scales of another library" in (tmp_path / "second" / "README.md").read_text()
