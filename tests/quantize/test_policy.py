import json

import pytest
import torch
from expecttest import assert_expected_inline
from tiny_llama import tiny_llama
from tiny_model import Model, formats, rejected
from tiny_moe import tiny_moe
from torch import nn
from torchao.quantization import FqnToConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

from rtn_tensor import (
    bits_per_weight,
    fqn_config,
    load,
    quantize_,
    rtn,
    rtn_int4,
    rtn_int8,
    save,
    select_layers,
    select_modules,
)
from rtn_tensor.quantize.selection import find, matches, parse_rule, rules_from_json, rules_to_json

KINDS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
RULES = [
    ("model.layers.0.*", rtn_int8(64)),
    ("*.down_proj", rtn(8, 32, "signed")),
    ("*.k_proj", None),
    ("*", rtn_int4(32)),
]


def expected_formats():
    """What RULES make of a tiny Llama, as `load` takes them."""
    found = {f"model.layers.0.{kind}.weight": (8, 64) for kind in KINDS}
    found |= {f"model.layers.1.{kind}.weight": (4, 32) for kind in KINDS if kind != "self_attn.k_proj"}
    return found | {"model.layers.1.mlp.down_proj.weight": (8, 32)}


# ----------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.b", True),
        ("a.b.weight", True),
        ("a.*", True),
        ("?.b", True),
        ("[ab].b", True),
        ("re:a.b", True),
        ("re:a", False),
    ]
    + [("A.b", False), ("b", False), ("a", False), ("*.B", False), ("a.b.", False)],
)
def test_a_pattern_is_all_of_a_name(pattern, expected):
    assert matches(pattern, "a.b.weight", "a.b") == expected


def test_first_match_wins_without_a_model():
    assert find(RULES, "model.layers.0.mlp.down_proj") == 0
    assert find(RULES, "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj") == 1
    assert find(RULES[:2], "model.layers.1.mlp.up_proj") is None


def test_quantize_by_rules():
    model = tiny_llama()
    quantize_(model, RULES)
    assert formats(model) == expected_formats() | {"lm_head.weight": (4, 32)}
    assert model.model.layers[1].mlp.down_proj.weight.scale_method == "signed"
    assert model.model.layers[0].mlp.down_proj.weight.scale_method == "absmax"


def test_order_counts():
    model = tiny_llama()
    quantize_(model, [("*.down_proj", rtn_int8()), ("*", rtn_int4()), ("model.layers.0.*", None)])
    assert formats(model)["model.layers.0.mlp.up_proj.weight"] == (4, 64)
    assert formats(model)["model.layers.0.mlp.down_proj.weight"] == (8, 128)


def test_wildcards_reach_what_is_quantized_by_default_and_names_all():
    model = Model()
    quantize_(model, [("*", rtn_int4(32))])
    assert set(formats(model)) == {"up.weight", "down.weight", "head.weight"}
    model = Model()
    quantize_(
        model, [("embed", rtn_int8(32)), ("*", rtn_int4(32))], filter_fn=lambda module, fqn: fqn == "up"
    )
    assert formats(model) == {"embed.weight": (8, 32), "up.weight": (4, 32)}
    assert rejected(Model(), [("emb*", rtn_int8())]) == (
        "the rule 'emb*' matches only weights that stay float unless named in full, as in 'embed'"
    )


def test_norms_and_biases_are_no_weights():
    assert rejected(Model(), [("norm", rtn_int8())]).startswith(
        "the rule 'norm' matches no weight; nearest are "
    )
    assert rejected(Model(), [("up.bias", rtn_int8())]).startswith(
        "the rule 'up.bias' matches no weight; nearest are 'up'"
    )


def test_the_default_choice_is_a_rule_too():
    model, expected = tiny_llama(), tiny_llama()
    assert str(quantize_(model, [("*", rtn_int4(64))])) == str(quantize_(expected, rtn_int4(64)))


def test_experts():
    model = tiny_moe("Mixtral")
    quantize_(model, [("*.down_proj", rtn_int8(32)), ("re:.*experts.*", rtn_int4(32)), ("*.k_proj", None)])
    bits = {
        name.partition("layers.0.")[2]: bits for name, (bits, _) in formats(model).items() if ".0." in name
    }
    assert bits == {"mlp.experts.gate_up_proj": 4, "mlp.experts.down_proj": 8}


def test_a_pattern_that_matches_nothing():
    assert_expected_inline(
        rejected(tiny_llama(), [("*", rtn_int4()), ("model.layers.1.mlp.donw_proj", rtn_int8())]),
        """\
the rule 'model.layers.1.mlp.donw_proj' matches no weight; nearest are 'model.layers.1.mlp.down_proj', \
'model.layers.0.mlp.down_proj', 'model.layers.1.mlp.up_proj', and * matches any text""",
    )
    assert rejected(tiny_llama(), [("*.q_prj", None), ("*", rtn_int4())]).startswith(
        "the rule '*.q_prj' matches no weight; nearest are "
    )


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("*", 4)], "rules[0] gives '*' an int; use rtn_int4(), rtn_int8(), rtn(...), or None for float"),
        (["*"], "rules[0] is '*'; give (pattern, config or None), as in ('*.down_proj', rtn_int8())"),
        (
            [("*", rtn_int4()), (3, None)],
            "rules[1] is (3, None); give (pattern, config or None), as in ('*.down_proj', rtn_int8())",
        ),
    ],
)
def test_what_is_no_rule(rules, message):
    with pytest.raises(TypeError) as caught:
        quantize_(tiny_llama(), rules)
    assert str(caught.value) == message


def test_a_wrong_regular_expression():
    assert rejected(tiny_llama(), [("re:(", rtn_int4())]).startswith(
        "rules[0], 're:(', is no regular expression: "
    )


def test_a_shared_weight_has_one_format():
    why = rejected(tiny_llama(tied=True), [("lm_head", rtn_int4()), ("model.embed_tokens", rtn_int8())])
    assert "shares its weight with" in why


# ---------------------------------------------------------------- load, save, transformers


@pytest.fixture
def folder(tmp_path):
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def assert_same(model, expected):
    names = [name for name, _ in expected.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    for name in names:
        a, b = model.get_parameter(name), expected.get_parameter(name)
        assert type(a) is type(b), name
        assert getattr(a, "scale_method", None) == getattr(b, "scale_method", None)
        assert torch.equal(a, b), name


def test_load_and_save(folder, tmp_path):
    model = load(folder, RULES)
    assert formats(model) == expected_formats()
    expected = tiny_llama(dtype=torch.bfloat16)
    quantize_(expected, [("lm_head", None), *RULES])
    assert_same(model, expected)
    save(model, tmp_path / "ours")
    assert_same(load(tmp_path / "ours"), model)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), model)


def test_load_says_which_rule_matches_nothing(folder):
    with pytest.raises(
        ValueError, match=r"^the rule '\*.up_prj' matches no weight; nearest are " r"'model.layers"
    ):
        load(folder, [("*.up_prj", rtn_int8()), ("*", rtn_int4())])
    with pytest.raises(
        ValueError, match="matches only weights that stay float unless named in full, as in 'lm_head'"
    ):
        load(folder, [("*lm_head", rtn_int8()), ("*", rtn_int4())])
    assert formats(load(folder, [("lm_head", rtn_int8()), ("*", rtn_int4())]))["lm_head.weight"] == (8, 128)


# Sorted, the rule for all would come first.
OVERLAPPING = [("model.layers.1.mlp.*", rtn_int8(32)), ("*.down_proj", None), ("*", rtn_int4(64))]


@pytest.mark.parametrize("rules", [RULES, OVERLAPPING])
def test_transformers(folder, tmp_path, rules):
    config = TorchAoConfig(fqn_config(folder, rules))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert_same(model, load(folder, rules))
    model.save_pretrained(tmp_path / "theirs")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"), model)
    assert_same(load(tmp_path / "theirs"), model)


def test_fqn_config_names_every_weight():
    model = tiny_moe("Mixtral")
    rules = [("*.experts.down_proj", rtn_int8(32)), ("*", rtn_int4(32))]
    config = fqn_config(model, rules)
    assert isinstance(config, FqnToConfig)
    assert not any("*" in name or name.startswith("re:") for name in config.fqn_to_config)
    again = tiny_moe("Mixtral")
    quantize_(again, FqnToConfig(dict(sorted(config.fqn_to_config.items()))))
    quantize_(model, [("lm_head", None), *rules])
    assert formats(again) == formats(model)


# --------------------------------------------------------------------------------- as text


def test_json_there_and_back():
    text = json.dumps(rules_to_json(RULES), sort_keys=True)
    assert rules_from_json(json.loads(text)) == RULES
    assert rules_from_json([["*.a", {"bits": 8}], ["*", {}]], rtn(4, 32, "signed")) == [
        ("*.a", rtn(8, 32, "signed")),
        ("*", rtn(4, 32, "signed")),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"*": 4}, "rules are {'*': 4}; give a list, as in"),
        (["*"], "rules[0] is '*'; give [pattern, "),
        ([["*", 4]], "rules[0] is 4; it takes 'bits', 'group_size', 'scale_method'"),
        ([["*", {"bit": 4}]], "rules[0] has 'bit'; it takes 'bits', 'group_size', 'scale_method'"),
        ([["*", None], ["*", {"bits": 5}]], "rules[1]: bits=5 is not supported; use 4 or 8"),
    ],
)
def test_json_that_is_no_rules(given, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is the result)
        rules_from_json(given)
    assert str(caught.value).startswith(message)


def test_a_rule_as_text():
    assert parse_rule("*=8") == ("*", rtn_int8())
    assert parse_rule("*.a=4,32") == ("*.a", rtn_int4(32))
    assert parse_rule("*.a=8,-1,signed", rtn(4, 32)) == ("*.a", rtn(8, -1, "signed"))
    assert parse_rule("*.a=8", rtn(4, 32, "signed")) == ("*.a", rtn(8, 32, "signed"))
    assert parse_rule("a=float") == ("a", None)
    for text in ("*", "=8", "float", "=float", "*=", "*=four", "*=4,32,signed,int8,1"):
        with pytest.raises(ValueError, match="is no rule; write PATTERN=BITS"):
            parse_rule(text)
    with pytest.raises(ValueError, match=r"^\*=5: bits=5 is not supported"):
        parse_rule("*=5")


# ------------------------------------------------------------------------------ selections


def test_select_layers(capsys):
    model = tiny_llama(layers=5)
    rules = select_layers(model, first=1, last=1, indices=[-2, 0])
    assert rules == [(f"model.layers.{i}.*", rtn_int8()) for i in (0, 3, 4)]
    assert_expected_inline(
        str(rules),
        """3 of 5 layers: 221,184 of 399,360 weights at 8.347 bits per weight, +2.215 bits per weight on average from 4-bit""",
    )
    assert repr(rules) == repr(list(rules))
    assert type(rules + [("*", rtn_int4())]) is list
    assert not capsys.readouterr().out
    quantize_(model, [*rules, ("*", rtn_int4())])
    assert {name for name, (bits, _) in formats(model).items() if bits == 8} == {
        f"model.layers.{i}.{k}.weight" for i in (0, 3, 4) for k in KINDS
    }


def test_what_a_selection_costs_is_what_the_report_finds():
    model = tiny_llama(layers=5, dtype=torch.bfloat16)
    selected = select_layers(model, last=2)
    said = float(str(selected).rpartition("+")[2].split()[0])
    rules = [*selected, ("*", rtn_int4(128))]
    predicted = bits_per_weight(model, rules)
    assert predicted - bits_per_weight(model, [("*", rtn_int4(128))]) == pytest.approx(said, abs=6e-4)
    rows = [row for row in quantize_(model, rules).rows if row.bits]
    assert predicted == 8 * sum(row.bytes_after for row in rows) / sum(
        torch.Size(row.shape).numel() for row in rows
    )


def test_select_modules():
    model = tiny_llama()
    rules = select_modules(model, ["down_proj", "lm_head"], rtn_int8(32))
    assert rules == [("*.down_proj", rtn_int8(32)), ("lm_head", rtn_int8(32))]
    assert str(rules).startswith("down_proj, lm_head: 61,440 of 178,176 weights at 9.000 bits per weight, ")
    moe = tiny_moe("Mixtral")
    quantize_(moe, select_modules(moe, ["down_proj"], rtn_int8(32)))
    assert {name.rpartition(".")[2] for name in formats(moe)} == {"down_proj"}
    both = nn.ModuleDict({"head": nn.Linear(64, 64), "mtp": nn.ModuleDict({"head": nn.Linear(64, 64)})})
    assert select_modules(both, ["head"], rtn_int8(32)) == [("*.head", rtn_int8(32)), ("head", rtn_int8(32))]


def test_bits_of_a_weight_of_several_places():
    """Counted once, as `report` does."""
    model = tiny_llama(tied=True)
    ends = lambda module, name: name in ("lm_head", "model.embed_tokens")  # noqa: E731
    rules = [("lm_head", rtn_int8(32)), ("model.embed_tokens", rtn_int8(32))]
    expected = bits_per_weight(model, rules, ends)
    rows = [row for row in quantize_(model, rules, ends).rows if row.bits and row.bytes_before]
    assert expected == 8 * sum(row.bytes_after for row in rows) / sum(
        torch.Size(row.shape).numel() for row in rows
    )


def test_bits_of_a_weight_that_is_computed():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)))
    with pytest.raises(ValueError, match=r"^0\.weight is computed by its module, not stored"):
        bits_per_weight(model, [("*", rtn_int4())])


def test_hybrid():
    model = tiny_llama(layers=3)
    quantize_(
        model, select_layers(model, first=1) + select_modules(model, ["down_proj"]) + [("*", rtn_int4())]
    )
    eight = {name for name, (bits, _) in formats(model).items() if bits == 8}
    assert eight == {f"model.layers.0.{kind}.weight" for kind in KINDS} | {
        f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)
    }


def test_selections_that_select_nothing():
    with pytest.raises(
        ValueError, match=r"^first=3, last=0, indices=\[\] of 2 layers; select 1 to 2 of " r"them$"
    ):
        select_layers(tiny_llama(), first=3)
    with pytest.raises(ValueError, match="of 2 layers; select 1 to 2 of them"):
        select_layers(tiny_llama())
    with pytest.raises(ValueError, match="Linear has no nn.ModuleList of layers"):
        select_layers(nn.Linear(32, 32), first=1)
    with pytest.raises(
        ValueError, match=r"^the rule 'dwn_proj' matches no weight; nearest are 'down_proj', "
    ):
        select_modules(tiny_llama(), ["dwn_proj"])
