"""`quantize`'s schemes, plans and recipes, and what it says without writing; `plan`."""

import json

import pytest
import torch
import yaml
from file_tree import tree
from safetensors.torch import load_file
from tiny_model import formats

from rtn_tensor import load


@pytest.mark.parametrize(
    ("scheme", "bits", "method", "activations"),
    [
        ("W4A16", 4, "search", None),
        ("W4A16_ASYM", 4, "minmax", None),
        ("W8A16", 8, "absmax", None),
        ("W4A8", 4, "search", "int8"),
        ("W8A8", 8, "absmax", "int8"),
    ],
)
def test_schemes(run, source, tmp_path, scheme, bits, method, activations):
    assert run("quantize", source, tmp_path / "q", "--scheme", scheme)[0] == 0
    w = load(tmp_path / "q").model.layers[0].mlp.up_proj.weight
    assert (w.bits, w.scale_method, w.activations) == (bits, method, activations)


@pytest.mark.parametrize(
    "more",
    [
        ["--bits", "8", "--scheme", "W4A16"],
        ["--bits-per-weight", "5", "--bits", "4"],
        ["--bits-per-weight", "5", "--group-size", "32"],
    ],
)
def test_options_that_contradict(run, source, tmp_path, more):
    status, out, err = run("quantize", source, tmp_path / "q", *more)
    assert (status, out) == (1, "")
    options = [option for option in more if option.startswith("--")]
    assert all(option in err for option in options)
    assert "each say what format weights get; leave one out" in err
    assert not (tmp_path / "q").exists()


def test_a_recipe_does_it_again(run, source, tmp_path):
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps([["*.k_proj", {"bits": 8, "group_size": 32}], ["*.v_proj", None]]))
    more = ["--group-size", 32, "--skip", "model.layers.0.*", "--rule", "*.q_proj=8", "--embedding"]
    status, _, err = run("quantize", source, tmp_path / "q", *more, "--rules", rules)
    assert status == 0, err
    recipe = tmp_path / "q" / "rtn_recipe.yaml"
    # What is a default is there as well: a later release may have another.
    assert yaml.safe_load(recipe.read_text()) == {
        "bits": 4,
        "group_size": 32,
        "scale_method": "search",
        "skip": ["model.layers.0.*"],
        "rule": ["*.q_proj=8", "*.k_proj=8,32,search", "*.v_proj=float"],
        "embedding": True,
        "format": "rtn",
    }
    assert run("quantize", source, tmp_path / "again", "--recipe", recipe)[0] == 0
    assert formats(load(tmp_path / "again")) == formats(load(tmp_path / "q"))
    again, before = (load_file(tmp_path / folder / "model.safetensors") for folder in ("again", "q"))
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert (tmp_path / "again" / "rtn_recipe.yaml").read_text() == recipe.read_text()


def test_what_is_given_counts_more_than_a_recipe(run, source, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"bits": 8, "group_size": 64}')
    assert run("quantize", source, tmp_path / "q", "--recipe", recipe, "--bits", 4)[0] == 0
    assert set(formats(load(tmp_path / "q")).values()) == {(4, 64)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bitz: 4", "'bitz' is no key of a recipe; did you mean bits?"),
        ("src: x", "'src' is no key of a recipe; it may have bits, scheme, "),
        ("- 4", "holds '[4]'; a recipe has lines as in 'bits: 4'"),
        ("bits: {a: 1}", "bits is \"{'a': 1}\"; write it as the option --bits"),
        ("a: [", "is no YAML ("),
    ],
)
def test_no_recipe(run, source, tmp_path, text, said):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    status, out, err = run("quantize", source, tmp_path / "q", "--recipe", recipe)
    assert (status, out) == (1, "")
    assert err.startswith(f"rtn-tensor: error: {recipe}")
    assert said in err


def test_a_recipes_values_are_checked(source, tmp_path, capsys):
    from rtn_tensor.cli import main

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("bits: 5")
    with pytest.raises(SystemExit) as caught:
        main(["quantize", str(source), str(tmp_path / "q"), "--recipe", str(recipe)])
    assert caught.value.code == 2
    assert "argument --bits: invalid choice: 5" in capsys.readouterr().err


def test_dry_run(run, source, tmp_path):
    before = tree(tmp_path)
    status, said, _ = run("quantize", source, tmp_path / "q", "--dry-run", "--json", "--embedding")
    assert (status, tree(tmp_path)) == (0, before)
    status, done, _ = run("quantize", source, tmp_path / "q", "--json", "--embedding")
    assert json.loads(said) == json.loads(done)


def test_plan(run, source, tmp_path):
    rules, picture = tmp_path / "rules.json", tmp_path / "map.png"
    args = ["plan", source, "--bits-per-weight", 5.5, "--skip", "*.v_proj"]
    status, out, err = run(*args, "-o", rules, "--draw", picture, "--json")
    assert status == 0, err
    told = json.loads(out)
    assert told["bits_per_weight"] <= 5.5
    assert told["rules"] == json.loads(rules.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run("quantize", source, tmp_path / "q", "--rules", rules)[0] == 0
    at_once = ["--bits-per-weight", 5.5, "--skip", "*.v_proj"]
    assert run("quantize", source, tmp_path / "q2", *at_once)[0] == 0
    assert formats(load(tmp_path / "q")) == formats(load(tmp_path / "q2"))
    assert not [name for name in formats(load(tmp_path / "q2")) if "v_proj" in name]
    status, _, err = run(*args, "-o", rules)
    assert (status, err.count("\n")) == (1, 1)
    assert "exists; choose another name, or replace it with --force" in err
    recipe = yaml.safe_load((tmp_path / "q2" / "rtn_recipe.yaml").read_text())
    assert recipe == {"skip": ["*.v_proj"], "bits_per_weight": 5.5, "format": "rtn"}


def test_a_plan_for_other_engines_has_what_they_have(run, source, tmp_path):
    args = ["--bits-per-weight", 6, "--format", "compressed-tensors"]
    status, _, err = run("quantize", source, tmp_path / "q", *args)
    assert status == 0, err
