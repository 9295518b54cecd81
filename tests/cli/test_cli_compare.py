"""`compare`, and the options of no command."""

import json

import pytest

from rtn_tensor import __version__, compare, load, report
from rtn_tensor.cli import main


def test_compare(run, source, quantized, tmp_path):
    import torch
    from tiny_llama import TEXT, tiny_tokenizer

    text, picture = quantized.parent / "text.txt", tmp_path / "picture.png"
    args = ["compare", quantized, source, "--text", text, "--window", 64]
    status, out, err = run(*args, "--json", "--draw", picture)
    assert status == 0, err
    told = json.loads(out)
    ids = torch.tensor(tiny_tokenizer()(TEXT)["input_ids"])
    found = compare(load(quantized), load(source), ids, 64)
    assert told["divergence"] == found.divergence
    assert told["agreement"] == found.agreement
    ours, theirs = told["models"]
    assert (ours["perplexity"], theirs["perplexity"]) == (found.perplexity, found.reference_perplexity)
    assert ours["bytes"] == report(load(quantized)).bytes_after < theirs["bytes"]
    assert min(ours["prefill"], ours["decode"]) > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    status, out, _ = run(*args)
    assert [line.split("  ")[0] for line in out.splitlines()[2:7]] == [
        "bytes",
        "bits per weight",
        "perplexity",
        "tokens read per second",
        "tokens written per second",
    ]
    assert f"divergence {found.divergence:.4f} nats per token" in out
    status, _, err = run(*args, "--draw", picture)
    assert status == 1
    assert "exists; choose another name, or replace it with --force" in err


def test_a_model_beside_itself(run, source, quantized):
    text = quantized.parent / "text.txt"
    status, out, _ = run("compare", source, source, "--text", text, "--json", "--max-tokens", 40)
    assert status == 0
    told = json.loads(out)
    assert (told["divergence"], told["agreement"]) == (0, 1)


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"rtn-tensor {__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(capsys, shell):
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", shell])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "bits-per-weight" in out
    assert "compare" in out


def test_completion_of_another_shell(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", "cmd"])
    assert caught.value.code == 2
    assert "is no shell that is known; use one of bash" in capsys.readouterr().err
