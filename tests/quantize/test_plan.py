import copy

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from tiny_llama import tiny_llama
from tiny_moe import tiny_moe

from rtn_tensor import RTNQuantizedTensor, bits_per_weight, load, plan, quantize_, rtn, rtn_int4, rtn_int8
from rtn_tensor.quantize.plan import spend

QKV = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


@pytest.fixture(scope="module")
def model():
    """Logits of its size are a trained model's; those of `tiny_llama` itself are near one-hot."""
    model = tiny_llama(dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.3 if p.dim() > 1 else 1.0)
    return model


@pytest.fixture(scope="module")
def planned(model):
    return plan(model, 6.0)


# -------------------------------------------------------------------------- what it spends


def test_the_budget_is_kept_and_spent(model, planned):
    assert 5.8 < planned.bits_per_weight <= 6.0
    assert bits_per_weight(model, planned) == pytest.approx(planned.bits_per_weight, abs=1e-12)
    copied = copy.deepcopy(model)
    rows = [row for row in quantize_(copied, planned).rows if row.bits]
    used = 8 * sum(row.bytes_after for row in rows) / sum(torch.Size(row.shape).numel() for row in rows)
    assert used == pytest.approx(planned.bits_per_weight, abs=1e-12)
    assert not isinstance(copied.lm_head.weight, RTNQuantizedTensor)


def test_it_is_deterministic_and_leaves_the_model_alone(model, planned):
    before = [(p, p.requires_grad, p.detach().clone()) for p in model.parameters()]
    state = torch.get_rng_state()
    again = plan(model, 6.0)
    assert list(again) == list(planned)
    assert again.sensitivity == planned.sensitivity
    assert torch.equal(torch.get_rng_state(), state)
    for p, (was, required, value) in zip(model.parameters(), before, strict=True):
        assert p is was
        assert p.grad is None
        assert p.requires_grad == required
        assert torch.equal(p, value)


def test_a_model_without_a_first_token(model):
    model = copy.deepcopy(model)
    model.config.bos_token_id = None
    assert plan(model, 6.0, sequences=2, length=8).tokens == "16 tokens of its own"


def test_more_bits_cost_less(model):
    first = plan(model, 4.5, sequences=8)
    plans = [first, *(first.at(bits) for bits in (5.0, 6.0, 20))]
    assert list(plans[1]) == list(plan(model, 5.0, sequences=8))
    divergences = [p.divergence for p in plans]
    assert divergences == sorted(divergences, reverse=True)
    best = {name: min(costs.values()) for name, costs in plans[-1].sensitivity.items()}
    assert plans[-1].divergence == pytest.approx(sum(best.values()))


def test_fused_modules_have_one_format(model):
    formats = dict(plan(model, 6.0, fuse=QKV))
    for i in range(2):
        assert len({formats[f"model.layers.{i}.self_attn.{kind}_proj.weight"] for kind in "qkv"}) == 1


def test_experts_transposed_or_not():
    for name in ("Mixtral", "GptOss"):
        model = tiny_moe(name)
        rules = plan(model, 7.0, sequences=4, options=[rtn_int4(32), rtn_int8(32)])
        assert {"gate_up_proj", "down_proj"} <= {name.rpartition(".")[2] for name, _ in rules}
        quantize_(model, rules)
        assert (
            model.model.layers[0].mlp.experts.down_proj.bits
            == dict(rules)["model.layers.0.mlp.experts.down_proj"].bits
        )


def test_rules_go_where_rules_go(model, planned, tmp_path):
    model.save_pretrained(tmp_path / "float")
    copied = copy.deepcopy(model)
    quantize_(copied, planned)
    for name, w in load(tmp_path / "float", planned).named_parameters():
        assert torch.equal(w, copied.get_parameter(name)), name


# ------------------------------------------------------------------------ what it measures


def divergence(model, other, ids):
    p, q = (m(ids, use_cache=False).logits.log_softmax(-1) for m in (model, other))
    return float(F.kl_div(q, p, reduction="sum", log_target=True)) / ids.numel()


def test_sensitivity_is_the_divergence_of_one_weight(model):
    """Of each weight alone, the sum over all of them within what 128 sequences can tell, each within a
    factor."""
    ids = torch.randint(0, 320, (128, 16), generator=torch.Generator().manual_seed(1))
    config = rtn_int4(32)
    planned = plan(model, 20, options=[config], text=ids)
    assert planned.tokens == "2048 given tokens"
    measured, expected = {}, {}
    for name, costs in planned.sensitivity.items():
        copied = copy.deepcopy(model)
        quantize_(copied, [(name, config)])
        with torch.no_grad():
            measured[name], expected[name] = divergence(model, copied, ids), costs[config]
    ratios = [expected[name] / measured[name] for name in measured]
    assert 0.5 < min(ratios)
    assert max(ratios) < 2
    assert sum(expected.values()) == pytest.approx(sum(measured.values()), rel=0.25)


def test_it_knows_what_a_weight_error_does_not(model):
    """Two equal weights, of which one feeds nothing."""
    model = copy.deepcopy(model)
    down = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    formats = dict(plan(model, 5.5, sequences=8))
    name = "model.layers.1.mlp.down_proj.weight"
    assert down.abs().sum() > 0
    assert formats[name].bits == 4
    assert max(plan(model, 5.5, sequences=8).sensitivity[name].values()) == 0


def test_what_a_plan_costs_is_measured(model):
    """With the model quantized by it, whose float weights and configs are then as before."""
    before, configs = dict(model.named_parameters()), vars(model.config).copy()
    ids = torch.randint(0, 320, (16, 64), generator=torch.Generator().manual_seed(1))
    planned = plan(model, 5.5, text=ids)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(p is before[name] for name, p in model.named_parameters())
    assert vars(model.config) == configs
    quantized = copy.deepcopy(model)
    quantize_(quantized, planned)
    with torch.no_grad():
        assert planned.measured == pytest.approx(divergence(model, quantized, ids[-2:]), rel=1e-3)
    assert planned.measured == pytest.approx(planned.divergence, rel=0.5)
    assert planned.at(6.0).measured is None


def test_a_plan_that_costs_much_warns(model):
    rough = copy.deepcopy(model)
    rough.lm_head.weight.data *= 8
    with pytest.warns(
        UserWarning, match=r"nats per token on the last 32 of 64 given tokens, more than 0.3; "
    ):
        planned = plan(rough, 4.5, text=torch.arange(64).view(4, 16))
    assert planned.measured > 0.3


# ------------------------------------------------------------------------------ the choice


def test_spend():
    four, six, eight = rtn(4), rtn(4, 32), rtn(8)
    sizes = {four: 4, six: 6, eight: 8}
    costs = [
        {four: 10.0, six: 9.0, eight: 1.0},
        {four: 3.0, six: 1.0, eight: 0.9},
        {four: 1.0, six: 2.0, eight: 1.5},
    ]
    bits = [sizes, sizes, sizes]
    assert spend(costs, bits, 12) == [four, four, four]
    assert spend(costs, bits, 15.9) == [four, six, four]
    assert spend(costs, bits, 16) == [eight, four, four]  # the step of most saved a bit comes first
    assert spend(costs, bits, 18) == [eight, six, four]
    assert spend(costs, bits, 100) == [eight, eight, four]
    with pytest.raises(ValueError, match="the smallest formats take 12 bits, and the budget is 11"):
        spend(costs, bits, 11)


# ------------------------------------------------------------------ how it looks, mistakes


def test_printed(model):
    planned = plan(model, 5.5, sequences=4, options=[rtn_int4(32, "signed"), rtn_int8()])
    first, *rest = str(planned).splitlines()
    assert first == (
        f"{planned.bits_per_weight:.3f} bits per weight, an expected divergence of {planned.divergence:.4f} "
        "nats per token "
        f"on 1024 tokens of its own, and a measured one of {planned.measured:.4f}"
    )
    assert str(planned.at(6.0)).splitlines()[0].endswith("nats per token on 1024 tokens of its own")
    assert_expected_inline(
        "\n".join(line.translate(str.maketrans("░▒▓█", "....")).rstrip(" .") for line in rest),
        """\
bits:group size, + for searched scales, +8 of 8 bits; shaded by what 4 bits would cost
layer     q_proj     k_proj     v_proj     o_proj  gate_proj    up_proj  down_proj
    0    8:128 .    8:128 .    8:128 .     4:32 .     4:32 .     4:32 .     4:32
    1     4:32 .     4:32 .     4:32 .     4:32 .     4:32 .     4:32 .     4:32""",
    )


def test_drawn(planned, tmp_path):
    pytest.importorskip("matplotlib")
    planned.draw(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_rules_beside_a_plan(planned):
    changed = planned.at(6.0)
    changed.insert(0, ("lm_head", rtn_int8()))
    assert str(changed) == str(planned.at(6.0))
    assert changed.divergence == planned.divergence


@pytest.mark.filterwarnings("ignore:the quantized model's next-token")  # its logits are near one-hot
def test_a_weight_of_several_places_is_planned_once():
    """And all its places have one format, or `quantize_` would refuse it."""
    model = tiny_llama(tied=True).eval()
    outer = lambda module, _: isinstance(module, torch.nn.Linear | torch.nn.Embedding)  # noqa: E731
    first = plan(model, 5.5, filter_fn=outer, sequences=2)
    for budget in (4.4, 5.0, 5.1, 5.5, 7.0):
        rules = first.at(budget)
        formats = dict(rules)
        assert formats["lm_head.weight"] == formats["model.embed_tokens.weight"]
        assert bits_per_weight(model, rules, outer) == pytest.approx(rules.bits_per_weight, abs=1e-12)
        copied = copy.deepcopy(model)
        rows = [row for row in quantize_(copied, rules, outer).rows if row.bytes_before and row.bits]
        used = 8 * sum(row.bytes_after for row in rows) / sum(torch.Size(row.shape).numel() for row in rows)
        assert used == pytest.approx(rules.bits_per_weight, abs=1e-12)


def test_it_writes_by_no_other_distribution(model, planned):
    """Whatever the model's generation config asks for."""
    model = copy.deepcopy(model)
    model.generation_config.update(
        num_beams=3, min_p=0.9, suppress_tokens=[1, 2], return_dict_in_generate=True, num_return_sequences=2
    )
    before = model.generation_config.to_dict()
    assert plan(model, 6.0).sensitivity == planned.sensitivity
    assert model.generation_config.to_dict() == before


def test_a_model_of_several_modalities():
    """Its config has no first token itself."""
    transformers = pytest.importorskip("transformers")
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    text |= {"head_dim": 32, "vocab_size": 300, "layer_types": ["full_attention"]}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert not hasattr(model.config, "bos_token_id")
    assert plan(
        model,
        6.0,
        sequences=2,
        length=8,
        filter_fn=lambda _, name: ".layers." in name and name.endswith("q_proj"),
    )


def test_numbers_that_are_not_finite(model):
    wide = copy.deepcopy(model)
    wide.lm_head.weight.data[0] = torch.inf
    with pytest.raises(
        ValueError,
        match=r"^the model's logits hold NaN or inf in torch.float32; load it in " r"bfloat16 or float32$",
    ):
        plan(wide, 6.0)
    steep = copy.deepcopy(model).half()  # next to the same function; gradients of fp16 overflow
    steep.model.layers[0].input_layernorm.weight.data *= 16384
    for kind in "qkv":
        steep.model.layers[0].self_attn.get_submodule(f"{kind}_proj").weight.data /= 16384
    with pytest.raises(
        ValueError,
        match=r"^model\.layers\.0\.self_attn\.\w_proj\.weight: its gradients " r"overflow in torch.float16",
    ):
        plan(steep, 6.0, text=torch.arange(64).view(2, 32))


def never(sequences):
    raise AssertionError("it has begun to measure")


@pytest.mark.parametrize(
    ("kind", "message", "arguments"),
    [
        (ValueError, "bits_per_weight='6'; give a number, as 4.5", {"bits_per_weight": "6"}),
        (
            ValueError,
            "bits_per_weight=4 is too few; the smallest of the options take 4.2500; of a model in bfloat16 "
            "they take less, as scales have "
            "the width of its floats",
            {"bits_per_weight": 4},
        ),
        (
            ValueError,
            "text is torch.int64 [8]; give int64 tokens [sequences, length]",
            {"text": torch.zeros(8, dtype=torch.int64)},
        ),
        (
            ValueError,
            "text is torch.int64 [0, 8]; give int64 tokens",
            {"text": torch.zeros(0, 8, dtype=torch.int64)},
        ),
        (ValueError, "text is a str; give int64 tokens", {"text": "Once upon a time"}),
        (ValueError, "sequences=0, length=256; give one sequence or more", {"sequences": 0}),
        (
            ValueError,
            "sequences=16, length=1; give one sequence or more, of two tokens or more",
            {"length": 1},
        ),
        (TypeError, "options is []; give formats to choose among", {"options": []}),
        (TypeError, "give formats to choose among", {"options": [rtn_int8(), None]}),
        (TypeError, "fuse is ['q_proj']; give a dict of lists", {"fuse": ["q_proj"]}),
        (TypeError, "fuse is {'qkv_proj': 'q_proj'}; give a dict of lists", {"fuse": {"qkv_proj": "q_proj"}}),
        (
            ValueError,
            "fuse: the rule 'q_prj' matches no weight; nearest are 'q_proj'",
            {"fuse": {"qkv_proj": ["q_prj", "k_proj"]}},
        ),
        (ValueError, "no weight is selected, so there is nothing to plan", {"filter_fn": lambda *_: False}),
    ],
)
@pytest.mark.filterwarnings("ignore:no weight is selected")
def test_mistakes(model, kind, message, arguments):
    """Told before anything is measured."""
    with pytest.raises(kind) as error:
        plan(model, **({"bits_per_weight": 6.0, "progress": never} | arguments))
    assert message in str(error.value)


def test_models_that_cannot_be_planned(model):
    with torch.inference_mode(), pytest.raises(RuntimeError, match="call it outside of torch.inference_mode"):
        plan(model, 5)
    with pytest.raises(
        TypeError,
        match=r"^Sequential is no causal language model of transformers, which could write; give "
        r"tokens as text$",
    ):
        plan(torch.nn.Sequential(torch.nn.Linear(64, 64)).eval(), 5)
    model = copy.deepcopy(model).train()
    with pytest.raises(ValueError, match="the model is in training mode"):
        plan(model, 5)
    quantize_(model.eval(), rtn_int4())
    with pytest.raises(ValueError, match="is already quantized"):
        plan(model, 5)
