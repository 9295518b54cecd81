"""Quantized weights in frames that Dynamo gives up."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_compile import close, mlp, weight
from tiny_llama import tiny_llama
from torch import nn
from torchao.utils import unwrap_tensor_subclass

from rtn_tensor import quantize_, rtn_int4

# torch.export copies what it deprecated itself.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`isinstance\(treespec, LeafSpec\)` is " r"deprecated:FutureWarning"
)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------- export


@pytest.fixture(scope="module")
def exportable():
    torch.manual_seed(0)
    model = mlp().eval().requires_grad_(False)
    return model, torch.randn(5, 96)


# ------------------------------------------------------------- frames that Dynamo gives up


def in_a_loop(w, x):
    for _ in range(2):
        print(end="")
        y = F.linear(x, w)
    return y


def in_a_try(w, x):
    try:
        print(end="")
        return F.linear(x, w)
    finally:
        print(end="")


@pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__
)
@pytest.mark.parametrize(
    "fn",
    [
        in_a_loop,
        in_a_try,
        lambda w, x: [print(end="") or x @ w.mT + x @ w.T for _ in range(2)][1],
        lambda w, x: [print(end="") or x[:, :64] @ w for _ in range(2)][1],
    ],
    ids=["loop", "try", "properties", "dx"],
)
def test_a_product_in_a_frame_with_a_graph_break(fn, mode):
    w, x = weight(64, 96), torch.randn(5, 96)
    with mode():
        close(torch.compile(fn, backend="aot_eager")(w, x), fn(w, x))


def parameter_in_a_loop(w, x):
    for _ in range(2):
        print(end="")
        p = nn.Parameter(w)
    return F.linear(x, p)


def parameter_in_a_try(w, x):
    try:
        print(end="")
        return F.linear(x, nn.Parameter(w, requires_grad=False))
    finally:
        print(end="")


@pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__
)
@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: F.linear(x, nn.Parameter(w, requires_grad=False)),
        parameter_in_a_loop,
        parameter_in_a_try,
        lambda w, x: [print(end="") or F.linear(x, w.detach()[:32].clone()) for _ in range(2)][1],
    ],
    ids=["alone", "loop", "try", "views"],
)
def test_a_parameter_made_in_a_frame_with_a_graph_break(fn, mode):
    w, x = weight(64, 96), torch.randn(5, 96)
    w.weight_loader = print
    with mode():
        close(torch.compile(fn, backend="aot_eager")(w, x), fn(w, x))


def test_the_size_of_a_weight_inside():
    """Dynamo answers element_size() by itself, with the size of the dtype."""
    w, x = weight(64, 96), torch.ones(1)
    sizes = torch.compile(lambda w, x: (x * w.nbytes, x * w.element_size()), backend="eager", fullgraph=True)
    assert [y.item() for y in sizes(w, x)] == [w.nbytes, w.dtype.itemsize]


def test_a_transformer_encoder():
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    quantize_(model, rtn_int4(32))
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        close(torch.compile(model, backend="aot_eager")(x), model(x))


# Where Dynamo begins at a product, it asks whether an input has a gradient, which warns of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(96, 64),
        lambda: nn.Linear(96, 64, bias=False),
        lambda: nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 8)),
    ],
    ids=["bias", "no-bias", "sequential"],
)
def test_the_compile_method_of_a_layer(make):
    """Dynamo skips the frames of torch's own layers, and begins in the first function of the tensor class."""
    layer = make()
    quantize_(layer, rtn_int4(32))
    inputs = [torch.randn(shape) for shape in [(5, 96), (7, 96), (2, 3, 96)]]
    expected = [layer(x) for x in inputs]
    layer.compile(fullgraph=True, backend="aot_eager")
    for x, y in zip(inputs, expected, strict=True):
        close(layer(x), y)


def test_the_compile_method_of_a_layer_in_inference_mode():
    layer, x = nn.Linear(96, 64), torch.randn(5, 96)
    quantize_(layer, rtn_int4(32))
    with torch.inference_mode():
        expected = layer(x)
        layer.compile(fullgraph=True, backend="aot_eager")
        close(layer(x), expected)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_the_compile_method_of_a_whole_model(fullgraph):
    model = tiny_llama()
    quantize_(model, rtn_int4(32))
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = model(ids).logits
        model.compile(fullgraph=fullgraph, backend="aot_eager")
        close(model(ids).logits, expected)


def test_export_unflatten(exportable):
    """torch gives the nodes that take a subclass apart no module; run_decompositions does."""
    model, x = exportable
    program = torch.export.export(copy.deepcopy(model), (x,)).run_decompositions()
    close(torch.export.unflatten(program)(x), model(x))


def test_unwrap_tensor_subclass(exportable):
    model, x = exportable
    plain = unwrap_tensor_subclass(copy.deepcopy(model))
    close(plain(x), model(x))
    close(torch.export.unflatten(torch.export.export(plain, (x,)))(x), model(x))
