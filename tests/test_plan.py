import copy

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from tiny_llama import tiny_llama
from tiny_moe import tiny_moe

from rtn_tensor import RTNQuantizedTensor, bits_per_weight, load, plan, quantize_, rtn, rtn_int4, rtn_int8
from rtn_tensor.plan import spend

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


# ------------------------------------------------------------------------------------------- what it spends


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
        assert model.model.layers[0].mlp.experts.down_proj.bits == dict(rules)["model.layers.0.mlp.experts.down_proj"].bits


def test_rules_go_where_rules_go(model, planned, tmp_path):
    model.save_pretrained(tmp_path / "float")
    copied = copy.deepcopy(model)
    quantize_(copied, planned)
    for name, w in load(tmp_path / "float", planned).named_parameters():
        assert torch.equal(w, copied.get_parameter(name)), name


# ------------------------------------------------------------------------------------------- what it measures


def divergence(model, other, ids):
    p, q = (m(ids, use_cache=False).logits.log_softmax(-1) for m in (model, other))
    return float(F.kl_div(q, p, reduction="sum", log_target=True)) / ids.numel()


def test_sensitivity_is_the_divergence_of_one_weight(model):
    """Of each weight alone, the sum over all of them within what 128 sequences can tell, each within a factor."""
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


# ------------------------------------------------------------------------------------------- the choice


def test_spend():
    four, six, eight = rtn(4), rtn(4, 32), rtn(8)
    sizes = {four: 4, six: 6, eight: 8}
    costs = [{four: 10.0, six: 9.0, eight: 1.0}, {four: 3.0, six: 1.0, eight: 0.9}, {four: 1.0, six: 2.0, eight: 1.5}]
    bits = [sizes, sizes, sizes]
    assert spend(costs, bits, 12) == [four, four, four]
    assert spend(costs, bits, 15.9) == [four, six, four]
    assert spend(costs, bits, 16) == [eight, four, four]  # the step of most saved a bit comes first
    assert spend(costs, bits, 18) == [eight, six, four]
    assert spend(costs, bits, 100) == [eight, eight, four]
    with pytest.raises(ValueError, match="the smallest formats take 12 bits, and the budget is 11"):
        spend(costs, bits, 11)


# ------------------------------------------------------------------------------------------- how it looks, mistakes


def test_printed(model):
    planned = plan(model, 5.5, sequences=4, options=[rtn_int4(32, "signed"), rtn_int8()])
    first, *rest = str(planned).splitlines()
    assert first == (
        f"{planned.bits_per_weight:.3f} bits a weight, an expected divergence of {planned.divergence:.4f} nats a token "
        "on 1024 tokens of its own"
    )
    assert_expected_inline(
        "\n".join(line.translate(str.maketrans("░▒▓█", "....")).rstrip(" .") for line in rest),
        """\
bits:group size, + for searched scales; shaded by what 4 bits would cost
layer     q_proj     k_proj     v_proj     o_proj  gate_proj    up_proj  down_proj
    0    8:128 .    8:128 .    8:128 .     4:32 .     4:32 .     4:32 .     4:32
    1     4:32 .     4:32 .     4:32 .     4:32 .     4:32 .     4:32 .     4:32""",
    )


def test_drawn(planned, tmp_path):
    pytest.importorskip("matplotlib")
    planned.draw(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes(model):
    with pytest.raises(ValueError, match=r"^bits_per_weight=4 is too few; the smallest of the options take 4\.\d+$"):
        plan(model, 4)
    with pytest.raises(ValueError, match=r"give int64 tokens \[sequences, length\]"):
        plan(model, 5, text=torch.zeros(8, dtype=torch.int64))
    model = copy.deepcopy(model).train()
    with pytest.raises(ValueError, match="the model is in training mode"):
        plan(model, 5)
    quantize_(model.eval(), rtn_int4())
    with pytest.raises(ValueError, match="is already quantized"):
        plan(model, 5)
