"""Weights that several modules share, and attributes that users set on weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from test_quantize import IDS, fake_quantized, select
from tiny_model import Model, all_weights, formats
from torch import nn

from rtn_tensor import (
    RTNQuantizedTensor,
    load,
    quantize_,
    report,
    rtn_int4,
    rtn_int8,
    save,
)
from rtn_tensor.tensor.attributes import user_attributes


def test_tied_weights_stay_tied():
    model = Model(tied=True)
    w = fake_quantized(model.embed.weight, 8)
    result = quantize_(model, rtn_int8(), all_weights)
    assert model.head.weight is model.embed.weight
    assert isinstance(model.embed.weight, RTNQuantizedTensor)
    torch.testing.assert_close(model.embed(IDS), F.embedding(IDS, w), rtol=0, atol=0)
    x = torch.randn(3, 64)
    torch.testing.assert_close(model.head(x), x @ w.T)
    assert_expected_inline(
        str(result),
        """\
weight          shape   bits  group  bytes before  bytes after  note
------------  -------  -----  -----  ------------  -----------  ------------------------
embed.weight  20 x 64      8    128         5,120        1,360
up.weight     96 x 64      8    128        24,576        6,528
down.weight   64 x 96      8    128        24,576        6,400
head.weight   20 x 64      8    128             0            0  shared with embed.weight
3 vectors              float                1,152        1,152  norms and biases
total                   8.91               55,424       15,440""",
    )


def test_linears_that_share_a_weight():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    quantize_(model, rtn_int4())
    assert model[2].weight is model[0].weight
    assert model[1].weight is not model[0].weight
    assert [row.note for row in report(model).rows if row.bits] == ["", "", "shared with 0.weight"]


@pytest.mark.parametrize(("quantized", "kept"), [("head", "embed"), ("embed", "head")])
def test_one_of_a_tied_pair(quantized, kept):
    model = Model(tied=True)
    w, x = model.embed.weight, torch.randn(3, 64)
    expected = {"embed": F.embedding(IDS, w), "head": x @ w.T}
    fake = fake_quantized(w)
    expected[quantized] = F.embedding(IDS, fake) if quantized == "embed" else x @ fake.T
    result = quantize_(model, rtn_int4(128, "absmax"), select(quantized))
    assert formats(model) == {f"{quantized}.weight": (4, 128)}
    assert model.get_submodule(kept).weight is w
    torch.testing.assert_close(model.embed(IDS), expected["embed"])
    torch.testing.assert_close(model.head(x), expected["head"])
    notes = {row.name: row.note for row in result.rows}
    assert notes[f"{quantized}.weight"] == f"untied from {kept}.weight"
    assert notes[f"{kept}.weight"] == f"untied from {quantized}.weight"


def test_two_of_three_that_share():
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(3)))
    model[1].weight = model[2].weight = model[0].weight
    result = quantize_(model, rtn_int4(32), select("0", "2"))
    assert model[0].weight is model[2].weight
    assert [(row.note, row.bytes_before) for row in result.rows] == [
        ("untied from 1.weight", 0),
        ("untied from 0.weight", 4096),
        ("shared with 0.weight", 0),
    ]


def test_attributes_of_the_parameter_are_kept():
    model = Model(tied=True)
    loader = object()
    model.up.weight.weight_loader = loader
    model.embed.weight.tag = "tied"
    quantize_(model, rtn_int4(), all_weights)
    assert model.up.weight.weight_loader is loader
    assert model.head.weight.tag == "tied"


def test_attributes_of_users_and_those_of_the_tensor_are_apart(tmp_path):
    """A float weight may have attributes that are called like a quantized one's own."""
    model, plain = Model(), Model()
    for name, value in {"fqn": 3, "untied_from": 5, "scale": 2.0, "bits": 16, "kept": "yes"}.items():
        setattr(model.up.weight, name, value)
    plain.load_state_dict(model.state_dict())
    assert str(quantize_(model, rtn_int4(32))) == str(quantize_(plain, rtn_int4(32)))
    torch.testing.assert_close(model(IDS), plain(IDS), rtol=0, atol=0)
    w = model.up.weight
    assert user_attributes(w) == {"kept": "yes"}
    for copied in (copy.deepcopy(w), w[2:], w.t(), nn.Parameter(w), w.to(torch.bfloat16)):
        assert (copied.fqn, copied.kept) == ("up.weight", "yes")
    model.up.weight.bits_of_users = 16
    folder = tmp_path / "model"
    save(model, folder)
    load(folder, model=model)
    assert (model.up.weight.fqn, user_attributes(model.up.weight)) == (
        "up.weight",
        {"kept": "yes", "bits_of_users": 16},
    )
