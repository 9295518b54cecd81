"""`refine_`, through the public API."""

import copy
import re

import pytest
import torch
from expecttest import assert_expected_inline
from mild_model import CONFIG, SMALL, divergence, mild, own_text, quantized, same_weights

from rtn_tensor import RTNQuantizedTensor, load, quantize_, refine_, report, rtn, rtn_int4, rtn_int8, save


@pytest.fixture(scope="module")
def model():
    return mild()


def test_it_diverges_less_on_text_that_it_has_not_seen(model):
    plain, refined = copy.deepcopy(model), copy.deepcopy(model)
    quantize_(plain, CONFIG)
    refine_(refined, CONFIG, length=128)
    ids = own_text(model)
    assert divergence(refined, model, ids) < 0.9 * divergence(plain, model, ids)
    # The same format and size.
    assert [(r.name, r.shape, r.bits, r.group_size, r.bytes_after) for r in report(refined).rows] == [
        (r.name, r.shape, r.bits, r.group_size, r.bytes_after) for r in report(plain).rows
    ]
    assert {w.scale_method for w in quantized(refined).values()} == {"search"}


def test_it_is_deterministic_and_draws_from_no_generator_of_the_user(model):
    state = torch.get_rng_state()
    one, two, other = (copy.deepcopy(model) for _ in range(3))
    refine_(one, CONFIG, **SMALL)
    refine_(two, CONFIG, **SMALL)
    refine_(other, CONFIG, **SMALL, seed=1)
    assert same_weights(one, two)
    assert not same_weights(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_report():
    model = mild(tied=True, dtype=torch.bfloat16, layers=1)
    result = refine_(
        model,
        [("lm_head", None), ("*.k_proj", None), ("*", rtn_int4(32))],
        tokens=torch.arange(128).view(2, 64),
    )
    # The numbers depend on the last bits of the kernels.
    assert_expected_inline(
        re.sub(r"0\.\d+", "0.##", str(result)),
        """\
weight                                     shape   bits  group  bytes before  bytes after  note
--------------------------------------  --------  -----  -----  ------------  -----------  ------------------------------------------
model.embed_tokens.weight               320 x 96  float               61,440       61,440  not selected
model.layers.0.self_attn.q_proj.weight   96 x 96      4     32        18,432        5,184  refined: 0.## times plain rounding's error
model.layers.0.self_attn.k_proj.weight   48 x 96  float                9,216        9,216  not selected
model.layers.0.self_attn.v_proj.weight   48 x 96      4     32         9,216        2,592  refined: 0.## times plain rounding's error
model.layers.0.self_attn.o_proj.weight   96 x 96      4     32        18,432        5,184  refined: 0.## times plain rounding's error
model.layers.0.mlp.gate_proj.weight     160 x 96      4     32        30,720        8,640  refined: 0.## times plain rounding's error
model.layers.0.mlp.up_proj.weight       160 x 96      4     32        30,720        8,640  refined: 0.## times plain rounding's error
model.layers.0.mlp.down_proj.weight     96 x 160      4     32        30,720        8,640  refined: 0.## times plain rounding's error
lm_head.weight                          320 x 96  float                    0            0  shared with model.embed_tokens.weight
3 vectors                                         float                  576          576  norms and biases
total                                              8.41              209,472      110,112
refined on 128 given tokens: 0.## times the error of plain rounding in the weights' outputs; 0 weights kept plain rounding
divergence from the float model: 0.## nats per token on 128 of these""",
    )
    assert result.plain == []
    assert 0 < result.error < 1
    told = result.to_dict()
    assert told["error"] == result.error
    assert told["inputs"] == "128 given tokens"
    assert [row["note"][:8] for row in told["weights"] if row["name"].endswith("q_proj.weight")] == [
        "refined:"
    ]


def test_each_weight_has_its_own_format(model):
    model = copy.deepcopy(model)
    rules = [
        ("*.0.*", rtn_int8(32)),
        ("*.up_proj", None),
        ("model.embed_tokens", rtn_int4(32)),
        ("*", rtn(4, -1)),
    ]
    result = refine_(model, rules, **SMALL)
    formats = {name: (w.bits, w.group_size, w.scale_method) for name, w in quantized(model).items()}
    assert formats["model.layers.0.mlp.up_proj.weight"] == (8, 32, "absmax")
    assert formats["model.layers.1.mlp.down_proj.weight"] == (4, -1, "search")
    assert "model.layers.1.mlp.up_proj.weight" not in formats
    assert result.plain == ["model.embed_tokens.weight"]  # it is multiplied by nothing


def test_a_shared_weight_is_refined_once_and_stays_shared():
    model = mild(tied=True)
    refine_(model, [("*", rtn_int8()), ("model.embed_tokens.weight", rtn_int8())], **SMALL)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model = mild(tied=True)
    result = refine_(model, rtn_int8(), **SMALL)
    assert isinstance(model.lm_head.weight, RTNQuantizedTensor)
    assert not isinstance(model.model.embed_tokens.weight, RTNQuantizedTensor)
    assert "lm_head.weight" not in result.plain


def test_it_compiles_saves_and_loads_as_any_other(model, tmp_path):
    model = copy.deepcopy(model)
    refine_(model, CONFIG, **SMALL)
    ids = torch.arange(10)[None]
    expected = model(ids).logits
    save(model, tmp_path / "q")
    again = load(tmp_path / "q")
    assert same_weights(again, model)
    torch.testing.assert_close(again(ids).logits, expected)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(ids).logits, expected)


def test_in_inference_mode_and_with_gradients_left_alone(model):
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    with torch.inference_mode():
        refine_(one, CONFIG, **SMALL)
    refine_(two, CONFIG, **SMALL)
    assert same_weights(one, two)
    assert two.model.norm.weight.requires_grad
