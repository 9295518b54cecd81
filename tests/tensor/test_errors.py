"""What a misuse says: one sentence that names the parameter, of one type, whether the model runs eagerly,
under autograd or compiled."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchao.quantization
from torch import nn

from rtn_tensor import (
    RTNQuantizedTensor,
    bits_per_weight,
    dequantize_,
    plan,
    quantize_,
    report,
    rtn_int4,
    save,
    select_layers,
    select_modules,
)
from rtn_tensor.wording import with_article


class Misused(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.proj, self.emb, self._forward = nn.Linear(64, 64), nn.Embedding(10, 64), forward

    def forward(self, x):
        return self._forward(self, x)


def misused(forward, names: bool = True) -> Misused:
    m = Misused(forward)
    if names:
        quantize_(m, [("proj", rtn_int4(32)), ("emb.weight", rtn_int4(32))])
    else:
        torchao.quantization.quantize_(
            m, rtn_int4(32), filter_fn=lambda module, fqn: isinstance(module, nn.Linear | nn.Embedding)
        )
    return m


def product(m: Misused, x):
    return m.proj(x)


X = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
MISUSES = {
    "float64": (
        product,
        X.double(),
        TypeError,
        "proj.weight: x is torch.float64 but the weight is torch.float32; use x.to(torch.float32)",
    ),
    "integers": (product, X.int(), TypeError, "proj.weight: x is torch.int32"),
    "complex": (product, X.cfloat(), TypeError, "proj.weight: x is torch.complex64"),
    "in_features": (
        product,
        X[:, :32],
        ValueError,
        "proj.weight: x of shape (2, 32) does not fit a weight of shape (64, 64)",
    ),
    "scalar": (product, X[0, 0], ValueError, "proj.weight: x of shape () does not fit"),
    "device": (product, X.to("meta"), ValueError, "proj.weight: x is on meta, where tensors have no numbers"),
    "quantized": (
        product,
        RTNQuantizedTensor.from_float(X, 4, 32),
        TypeError,
        "proj.weight: a quantized tensor cannot multiply",
    ),
    "matmul": (lambda m, x: x @ m.proj.weight.t(), X.double(), TypeError, "proj.weight: x is torch.float64"),
    "matmul's size": (
        lambda m, x: x @ m.proj.weight,
        X[:, :32],
        ValueError,
        "proj.weight: x of shape (2, 32) does not fit",
    ),
    "bias": (
        lambda m, x: F.linear(x, m.proj.weight, X[0].double()),
        X,
        TypeError,
        "proj.weight: bias is torch.float64 but x is",
    ),
    "bias's size": (
        lambda m, x: F.linear(x, m.proj.weight, X[0, :63]),
        X,
        RuntimeError,
        "proj.weight: bias of shape (63,) does not fit",
    ),
    "addmm's size": (
        lambda m, x: torch.addmm(X[0, :63], x, m.proj.weight),
        X,
        RuntimeError,
        "proj.weight: bias of shape (63,) does not",
    ),
    "unknown op": (
        lambda m, x: m.proj.weight.softmax(-1),
        X,
        NotImplementedError,
        "proj.weight: RTNQuantizedTensor does not implement aten._",
    ),
    "op in place": (
        lambda m, x: m.proj.weight.sin_(),
        X,
        NotImplementedError,
        "proj.weight: RTNQuantizedTensor does not implement aten.sin_",
    ),
    "arithmetic": (
        lambda m, x: x * m.proj.weight[:2],
        X,
        NotImplementedError,
        "proj.weight: RTNQuantizedTensor does not implement aten.mul",
    ),
    "slice": (lambda m, x: m.proj.weight[:, 1:3], X, ValueError, "proj.weight: cannot slice columns 1:3"),
    "view": (
        lambda m, x: m.proj.weight.view(-1),
        X,
        ValueError,
        "proj.weight: cannot view shape (64, 64) as (-1,)",
    ),
    "cat": (lambda m, x: torch.cat([m.proj.weight, x]), X, TypeError, "proj.weight: cannot cat"),
    "einsum": (
        lambda m, x: torch.einsum("ij,kj->ikj", x, m.proj.weight),
        X,
        NotImplementedError,
        "proj.weight: einsum(",
    ),
    "bmm": (lambda m, x: torch.bmm(x, m.proj.weight), X, ValueError, "proj.weight: bmm needs x [E, M, K]"),
    "float64 weight": (
        lambda m, x: m.proj.weight.double(),
        X,
        TypeError,
        "proj.weight: dtype torch.float64 is not supported",
    ),
    "no indices": (
        lambda m, x: m.emb(x),
        X,
        TypeError,
        "emb.weight: input is torch.float32; it must be torch.int64 or torch.int32",
    ),
}
EAGER = {
    "grad": torch.enable_grad(),
    "no_grad": torch.no_grad(),
    "inference_mode": torch.inference_mode(),
    "autocast": torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", EAGER)
@pytest.mark.parametrize("case", MISUSES)
def test_eager(case: str, mode: str):
    forward, x, kind, sentence = MISUSES[case]
    sentence = sentence.replace(
        "but x is", "but x is torch.bfloat16" if mode == "autocast" else "but x is torch.float32"
    )
    with pytest.raises(kind) as caught:
        EAGER[mode](misused(forward))(x)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(sentence)


def test_with_a_gradient():
    for case in ("float64", "in_features", "bias", "bias's size"):
        forward, x, kind, sentence = MISUSES[case]
        with pytest.raises(kind) as caught:
            misused(forward)(x.clone().requires_grad_())
        assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("case", MISUSES)
def test_compiled_is_as_eager(case: str):
    """Dynamo leaves what cannot be traced to eager code, and that raises."""
    mode = (
        "inference_mode"
        if case in ("float64", "unknown op")
        else "no_grad"
        if case in ("in_features", "view")
        else "grad"
    )
    forward, x, kind, sentence = MISUSES[case]
    torch._dynamo.reset()
    with pytest.raises(kind) as caught:
        EAGER[mode](torch.compile(misused(forward), backend="aot_eager"))(x)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("case", MISUSES)
def test_in_one_graph_the_sentence_is_inside(case: str):
    forward, x, _, sentence = MISUSES[case]
    torch._dynamo.reset()
    with pytest.raises(RuntimeError) as caught, torch.no_grad():
        torch.compile(misused(forward), backend="aot_eager", fullgraph=True)(x)
    assert sentence in str(caught.value)


def test_in_one_graph_the_layer_at_fault_is_named():
    """Layers alike share a graph, and yet each error has the name of its own."""
    torch._dynamo.reset()
    m = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantize_(m, rtn_int4(32))
    counter = torch._dynamo.testing.CompileCounter()
    shared = torch.compile(lambda w: F.linear(X, w), backend=counter)
    for layer in m:
        shared(layer.weight)
    assert counter.frame_count == 1
    for i, layer in enumerate(m):
        with pytest.raises(RuntimeError, match=f"{i}.weight: x of shape"):
            torch.compile(layer, backend="aot_eager", fullgraph=True)(X[:, :32])


def test_what_a_shared_graph_gives_has_no_others_name():
    torch._dynamo.reset()
    m = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantize_(m, rtn_int4(32))
    rows = torch.compile(lambda w: w[32:], backend="aot_eager")
    rows(m[0].weight)
    assert getattr(rows(m[1].weight), "fqn", "1.weight") == "1.weight"


@pytest.mark.parametrize("case", [case for case in MISUSES if case != "quantized"])
def test_weights_that_others_quantized_are_named_by_the_model_that_runs(case: str):
    forward, x, kind, sentence = MISUSES[case]
    with pytest.raises(kind) as caught:
        copy.deepcopy(misused(forward, names=False))(x)
    assert str(caught.value).startswith(sentence)
    outer = nn.ModuleDict({"inner": misused(forward, names=False)})
    outer.forward = outer["inner"].forward  # type: ignore[method-assign]
    with pytest.raises(kind, match="^inner.|^proj|^emb"):
        outer(x)


def test_capsules_and_storages_that_have_no_memory():
    w = misused(product).proj.weight
    with pytest.raises(
        NotImplementedError, match=r"^proj\.weight: DLPack gives the memory .*use " r"\.dequantize\(\)"
    ):
        torch.utils.dlpack.to_dlpack(w)
    with pytest.raises(NotImplementedError, match=r"^proj\.weight: DLPack"):
        torch.to_dlpack(w)
    for part in (w, w[:32], w.t()):
        with pytest.raises(
            TypeError, match=r"^proj\.weight: a quantized weight lies in two planes.*\.qdata " r"and \.scale"
        ):
            part.untyped_storage()
    plain = torch.randn(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(plain)), plain)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: plan(model, 5.0),
        lambda model: bits_per_weight(model, [("*", rtn_int4())]),
        lambda model: select_layers(model, first=1),
        lambda model: select_modules(model, ["q_proj"]),
        report,
        dequantize_,
        lambda model: save(model, "my-model-int4"),
    ],
    ids=["plan", "bits_per_weight", "select_layers", "select_modules", "report", "dequantize_", "save"],
)
def test_a_folder_in_the_place_of_a_model(call):
    with pytest.raises(TypeError, match=r"^model is a str; give a module, as load\(path\) returns$"):
        call("my-model")


def test_articles():
    names = "str int Embedding LSTM RTNConfig UninitializedParameter Linear UserDict MLP LlamaMLP NoneType"
    assert " ".join(map(with_article, names.split())) == (
        "a str an int an Embedding an LSTM an RTNConfig an UninitializedParameter a Linear a UserDict an MLP "
        "a LlamaMLP a NoneType"
    )
