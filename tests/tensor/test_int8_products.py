"""Weights that have their activations rounded to int8: wherever a weight goes, its products stay what they are."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from quantized_weights import every_dtype, every_width
from test_copies import GATHERS
from test_views import VIEWS
from tiny_llama import tiny_llama
from tiny_moe import tiny_moe
from torch import nn

from rtn_tensor import (
    RTNQuantizedTensor,
    bits_per_weight,
    dequantize_,
    explain,
    export,
    load,
    plan,
    quantize_,
    refine_,
    report,
    rtn,
    rtn_int4,
    rtn_int8,
    save,
    set_activations_,
)
from rtn_tensor.checkpoint.sources import flattened
from rtn_tensor.quantize.selection import parse_rule, rules_from_json, rules_to_json
from rtn_tensor.reference import rounded_to_int8

BF16 = torch.bfloat16


def weight(*shape, bits=4, group_size=32, **kwargs):
    return RTNQuantizedTensor.from_float(torch.randn(shape), bits, group_size, activations="int8", **kwargs)


def plain(w):
    """The same weight, which leaves its activations as they are."""
    new = w.clone()
    new.activations = None
    return new


def assert_rounds(y, x, w):
    """That y is x @ w^T, of x as int8 has it, and is not of x as it is."""
    exact = rounded_to_int8(x).double() @ w.dequantize(torch.float64).mT
    tolerance = 2 * torch.finfo(y.dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=1e-4)
    if y.dtype == torch.float32:
        assert (y - x @ w.dequantize().mT).abs().max() > 1e-3


@every_dtype
@every_width
def test_products(dtype, bits):
    w, x = weight(40, 100, bits=bits, dtype=dtype), torch.randn(7, 100).to(dtype)
    y = F.linear(x, w)
    assert_rounds(y, x, w)
    for same in (x @ w.t(), torch.mm(x, w.mT), F.linear(x[None], w)[0]):
        assert torch.equal(same, y)
    torch._dynamo.reset()
    graph = torch.compile(lambda x, w: F.linear(x, w), fullgraph=True)
    assert torch.equal(graph(x, w), y)
    assert torch.equal(graph(x, plain(w)), F.linear(x, plain(w)))


def test_a_product_over_the_rows_leaves_them_as_they_are():
    w, x = weight(64, 96), torch.randn(5, 64)
    assert torch.equal(x @ w, x @ plain(w))


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    w = VIEWS[view](weight(6, 300))
    if isinstance(w, RTNQuantizedTensor):
        assert (w.activations, w.version) == ("int8", 3)


@pytest.mark.parametrize("gather", GATHERS)
def test_gathers(gather):
    assert GATHERS[gather](weight(6, 300)).activations == "int8"


def test_copies():
    w = weight(5, 100, dtype=BF16)
    moved = (w.to("cpu"), w.float(), w.half(), torch.empty_like(w), w.new_zeros(3, 64))
    for same in (
        w.clone(),
        w.detach(),
        copy.copy(w),
        copy.deepcopy(w),
        pickle.loads(pickle.dumps(w)),
        *moved,
    ):
        assert (same.activations, same.version) == ("int8", 3)
    filled = w.clone()
    filled.copy_(torch.randn(5, 100))
    filled.data = torch.randn(5, 100, dtype=BF16)
    assert filled.activations == "int8"
    assert not torch.equal(w, plain(w))
    with pytest.raises(TypeError, match="format and dtype must be the same"):
        torch.cat([w, plain(w)])


def test_gradients_pass_straight_through():
    w, x = weight(40, 96), torch.randn(5, 96)
    gradients = []
    for of in (w, plain(w)):
        given = x.clone().requires_grad_()
        F.linear(given, of, torch.ones(40)).square().sum().backward()
        gradients.append(given.grad)
    by_hand = 2 * (F.linear(x, w, torch.ones(40))) @ w.dequantize()
    torch.testing.assert_close(gradients[0], by_hand)
    assert 0 < (gradients[0] - gradients[1]).abs().max() < 0.1 * gradients[1].abs().max()
    tangent = torch.func.jvp(lambda x: F.linear(x, w), (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, F.linear(torch.ones_like(x), plain(w)))
    batch = torch.func.vmap(lambda x: F.linear(x, w))(torch.stack([x, 2 * x]))
    assert torch.equal(batch[0], F.linear(x, w))


def test_experts():
    w, offs = weight(3, 40, 96), torch.tensor([2, 2, 9], dtype=torch.int32)
    x = torch.randn(9, 96)
    y = F.grouped_mm(x, w.mT, offs=offs)
    assert_rounds(y[:2], x[:2], w[0])
    assert_rounds(y[2:], x[2:], w[2])
    given = x.clone().requires_grad_()
    F.grouped_mm(given, w.mT, offs=offs).sum().backward()
    due = x.clone().requires_grad_()
    F.grouped_mm(due, plain(w).mT, offs=offs).sum().backward()
    assert torch.equal(given.grad, due.grad)


def test_the_experts_of_a_model():
    model, ids = tiny_moe("Mixtral").eval(), torch.arange(24)[None]
    quantize_(model, rtn_int8(32, activations="int8"))
    with torch.no_grad():
        rounded = model(ids).logits
        set_activations_(model, None)
        exact = model(ids).logits
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def test_a_model_is_switched():
    model, ids = tiny_llama().eval(), torch.arange(24)[None]
    quantize_(model, rtn_int4(32))
    planes = {name: w.qdata.data_ptr() for name, w in model.named_parameters() if hasattr(w, "qdata")}
    with torch.no_grad():
        exact = model(ids).logits
        told = set_activations_(model, "int8")
        rounded = model(ids).logits
        assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()
        notes = {row.note for row in told.rows if row.bits}
        assert notes == {"int8 activations"}
        assert "int8" in str(model.config.quantization_config)
        assert "int8 activations" not in str(set_activations_(model, None))
        assert torch.equal(model(ids).logits, exact)
    assert planes == {name: w.qdata.data_ptr() for name, w in model.named_parameters() if hasattr(w, "qdata")}
    dequantize_(set_activations_(model, "int8") and model)
    assert report(model).bits_per_weight == 32


def test_files(tmp_path):
    model, ids = tiny_llama(dtype=BF16).eval(), torch.arange(24)[None]
    model.save_pretrained(tmp_path / "float")
    quantize_(model, [("*.down_proj", rtn_int8(32)), ("*", rtn_int4(32, activations="int8"))])
    save(model, tmp_path / "q")
    again = load(tmp_path / "q")
    found = {w.activations for w in again.parameters() if isinstance(w, RTNQuantizedTensor)}
    assert found == {"int8", None}
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        by_transformers = type(model).from_pretrained(tmp_path / "q", dtype=BF16).eval()
        assert torch.equal(by_transformers(ids).logits, model(ids).logits)
    torch.save(model.state_dict(), tmp_path / "q.pt")
    state = torch.load(tmp_path / "q.pt", weights_only=True)
    assert state["model.layers.0.mlp.up_proj.weight"].activations == "int8"
    streamed = load(tmp_path / "float", rtn_int4(32, activations="int8"))
    assert streamed.get_parameter("model.layers.0.mlp.up_proj.weight").activations == "int8"


def test_exported(tmp_path):
    model, x = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 40)), torch.randn(5, 96)
    quantize_(model, rtn_int4(32, activations="int8"))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.equal(again(x), model(x))
    assert torch.equal(again(x[:3]), model(x[:3]))
    products = [node for node in program.graph.nodes if node.target is torch.ops.rtn.linear.default]
    assert [node.args[-1] for node in products] == [True, True]


def test_another_format_has_no_place_for_it(tmp_path):
    model = tiny_llama(dtype=BF16)
    quantize_(model, [("*_proj", rtn_int4(32, activations="int8"))])
    told = export(model, tmp_path / "out", "compressed-tensors")
    assert "int8 activations are not written: an engine takes activations in its own way." in told.changes
    assert export(set_activations_(model, None) and model, tmp_path / "other", "gptq").changes == []


def test_the_reference_is_what_runs_where_no_kernel_does(monkeypatch):
    w, x = weight(40, 96), torch.randn(5, 96)
    y = F.linear(x, w)
    monkeypatch.setenv("RTN_KERNEL", "reference")
    torch.testing.assert_close(F.linear(x, w), y)
    monkeypatch.setenv("RTN_KERNEL", "dense")
    with pytest.raises(
        ValueError, match="RTN_KERNEL='dense' cannot run .*: It multiplies activations as they"
    ):
        F.linear(x, w)


def test_a_file_says_it_only_where_it_is_so():
    w = weight(6, 64)
    said = [flattened({"a.w": of})[1]["a.w"] for of in (w, plain(w))]
    assert ["activations" in text for text in said] == [True, False]
    assert '"version": 3' in said[0]


@pytest.mark.filterwarnings("ignore:the quantized model's next-token")
def test_refined_and_planned():
    model, ids = tiny_llama().eval(), torch.randint(0, 300, (4, 64))
    planned = plan(copy.deepcopy(model), 8, options=[rtn(4, 32, activations="int8")], sequences=1, length=16)
    assert {config.activations for _, config in planned if config} == {"int8"}
    refine_(model, rtn_int4(32, activations="int8"), tokens=ids)
    assert model.get_parameter("model.layers.0.mlp.up_proj.weight").activations == "int8"


def test_rules_as_text():
    rules = [("*.down_proj", rtn_int8(activations="int8")), ("*", rtn_int4())]
    as_json = rules_to_json(rules)
    assert ["activations" in config for _, config in as_json] == [True, False]
    assert rules_from_json(as_json) == rules
    assert parse_rule("*=4,32,search,int8") == ("*", rtn_int4(32, activations="int8"))
    assert bits_per_weight(tiny_llama(), rules) == bits_per_weight(
        tiny_llama(), [("*.down_proj", rtn_int8()), ("*", rtn_int4())]
    )


def test_what_it_looks_like():
    w = weight(6, 64)
    assert "activations='int8'" in repr(w)
    assert "activations" not in repr(plain(w))
    told = explain(w, torch.randn(3, 64))
    assert "int8 activations" in str(told)
    assert told.reasons["dense"] == "It multiplies activations as they are, not as int8."
    assert told.to_dict()["problem"]["int8_x"] is True
    assert explain(w, torch.randn(3, 6), op="linear_dx").problem.int8_x is False
    assert explain(bits=4, activations="int8").problem.int8_x is True


UNKNOWN = (
    "activations='int4' is not supported; use 'int8', to round them to 8 bits before a product, or None, "
    "to leave them as they are"
)


@pytest.mark.parametrize(
    "use",
    [
        lambda: rtn(4, activations="int4"),
        lambda: RTNQuantizedTensor.from_float(torch.randn(4, 64), activations="int4"),
        lambda: RTNQuantizedTensor.empty(4, 64, activations="int4"),
        lambda: set_activations_(tiny_llama(), "int4"),
        lambda: explain(bits=4, activations="int4"),
        lambda: rules_from_json([["*", {"activations": "int4"}]]),
    ],
)
def test_unknown_activations(use):
    with pytest.raises(ValueError, match=f"(^|: ){UNKNOWN}"):
        use()


def test_a_float_model_has_none_to_set():
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(
        ValueError, match="no weight of the Sequential is quantized, and activations='int8' is"
    ):
        set_activations_(model, "int8")
    with pytest.raises(TypeError, match="model is a str; give a module"):
        set_activations_("folder", "int8")


def test_a_version_that_has_no_such_weights():
    w = weight(6, 64)
    with pytest.raises(
        ValueError, match="version=2 of the format has activations as they are only; it came with"
    ):
        RTNQuantizedTensor(w.qdata, w.scale, 4, 32, "search", 64, version=2, activations="int8")
    with pytest.raises(ValueError, match="is of version 4 of the format, and this rtn-tensor reads up to 3"):
        RTNQuantizedTensor(w.qdata, w.scale, 4, 32, "search", 64, version=4)
