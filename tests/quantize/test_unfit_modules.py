"""Weights that their module does not multiply by: refused before anything changes, however they are named.
And those that work."""

import copy
import warnings

import pytest
import torch
import torchao.quantization
from torch import nn
from torch.nn.utils import parametrizations
from torchao.quantization import FqnToConfig
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TorchAoConfig

from rtn_tensor import (
    RTNQuantizedTensor,
    bits_per_weight,
    dequantize_,
    load,
    quantize_,
    rtn_int4,
    rtn_int8,
    save,
)


class Own(nn.Conv1d):
    pass


def old_norm(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return norm(nn.Linear(64, 64))


UNFIT = {
    "nn.Embedding with max_norm": (
        lambda: nn.Embedding(8, 64, max_norm=1.0),
        "weight",
        "set max_norm to None",
    ),
    "nn.LSTM": (lambda: nn.LSTM(64, 64), "weight_ih_l0", "nn.LSTM"),
    "nn.GRU": (lambda: nn.GRU(64, 64), "weight_hh_l0", "nn.GRU"),
    "nn.RNN": (lambda: nn.RNN(64, 64), "weight_ih_l0", "nn.RNN"),
    "nn.Conv1d": (lambda: nn.Conv1d(64, 64, 3), "weight", "nn.Conv1d"),
    "nn.Conv2d": (lambda: nn.Conv2d(64, 64, 3), "weight", "nn.Conv2d"),
    "nn.Conv3d": (lambda: nn.Conv3d(64, 64, 3), "weight", "nn.Conv3d"),
    "nn.ConvTranspose1d": (lambda: nn.ConvTranspose1d(64, 64, 3), "weight", "nn.ConvTranspose1d"),
    "one's own convolution": (lambda: Own(64, 64, 3), "weight", "nn.Conv1d"),
    "nn.EmbeddingBag": (lambda: nn.EmbeddingBag(8, 64), "weight", "nn.EmbeddingBag"),
    "nn.Bilinear": (lambda: nn.Bilinear(64, 64, 8), "weight", "nn.Bilinear"),
    "nn.LayerNorm": (lambda: nn.LayerNorm([5, 64]), "weight", "nn.LayerNorm"),
    "nn.RMSNorm": (lambda: nn.RMSNorm([5, 64]), "weight", "nn.RMSNorm"),
    "nn.MultiheadAttention's extra key": (
        lambda: nn.MultiheadAttention(64, 4, add_bias_kv=True),
        "bias_k",
        "nn.MultiheadAttention",
    ),
    "a lazy linear": (lambda: nn.LazyLinear(64), "weight", "is uninitialized until its module has run"),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(64, 64)),
        "parametrizations.weight.original1",
        "computes another weight from it; remove that first",
    ),
    "orthogonal": (
        lambda: parametrizations.orthogonal(nn.Linear(64, 64)),
        "parametrizations.weight.original",
        "computes another weight",
    ),
    "old weight_norm": (lambda: old_norm(nn.utils.weight_norm), "weight_v", "computes another weight"),
    "old spectral_norm": (lambda: old_norm(nn.utils.spectral_norm), "weight_orig", "computes another weight"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_refused_at_once(case):
    make, name, why = UNFIT[case]
    model = nn.ModuleDict({"first": nn.Linear(64, 64), "odd": make()})
    for config in (
        [("first", rtn_int8()), (f"odd.{name}", rtn_int8())],
        FqnToConfig({"first": rtn_int8(), f"odd.{name}": rtn_int8()}),
    ):
        with pytest.raises(ValueError, match="cannot quantize, and nothing was changed") as caught:
            quantize_(model, config)
        assert f"odd.{name} " in str(caught.value)
        assert why in str(caught.value)
        assert not any(isinstance(p, RTNQuantizedTensor) for p in model.parameters())
    with pytest.raises(ValueError, match=f"{name} "):
        torchao.quantization.quantize_(model, FqnToConfig({f"odd.{name}": rtn_int8()}), filter_fn=None)


def test_a_filter_that_selects_them():
    for module, why in (
        (nn.Conv1d(64, 64, 3), "an nn.Conv1d"),
        (nn.Embedding(8, 64, max_norm=1.0), "max_norm"),
        (nn.EmbeddingBag(8, 64), "an nn.EmbeddingBag"),
    ):
        with pytest.raises(ValueError, match=f"0.weight belongs to .*{why[-8:]}"):
            quantize_(nn.Sequential(module), rtn_int8(), filter_fn=lambda module, name: name == "0")


def test_torchao_over_an_old_weight_norm():
    linear = old_norm(nn.utils.weight_norm)
    with pytest.raises(ValueError, match="weight is computed by its module"):
        torchao.quantization.quantize_(linear, rtn_int8())
    assert linear(torch.randn(2, 64)).shape == (2, 64)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Parameter(torch.randn(96, 64))

    def forward(self, x):
        return x @ self.proj.T


X, Y = torch.randn(3, 12, 64, generator=torch.Generator().manual_seed(0)).split([5, 7], 1)
ATTENTION = ["in_proj_weight", "out_proj.weight"]
FIT = {
    "attention": (lambda: nn.MultiheadAttention(64, 4, batch_first=True), ATTENTION, lambda m: m(X, X, X)[0]),
    "cross attention": (
        lambda: nn.MultiheadAttention(64, 4, batch_first=True),
        ATTENTION,
        lambda m: m(X, Y, Y)[0],
    ),
    "attention of three inputs": (
        lambda: nn.MultiheadAttention(64, 4, batch_first=True),
        ATTENTION,
        lambda m: m(X, Y, Y + 1)[0],
    ),
    "attention of other keys": (
        lambda: nn.MultiheadAttention(64, 4, kdim=32, vdim=32, batch_first=True),
        ["q_proj_weight", "k_proj_weight", "v_proj_weight"],
        lambda m: m(X, Y[..., :32], Y[..., :32])[0],
    ),
    "a transformer layer": (
        lambda: nn.TransformerEncoderLayer(64, 4, batch_first=True),
        ["self_attn.in_proj_weight", "linear1", "linear2"],
        lambda m: m(X),
    ),
    "a cell": (lambda: nn.GRUCell(64, 64), ["weight_ih", "weight_hh"], lambda m: m(X[0])),
    "an embedding": (
        lambda: nn.Embedding(8, 64, padding_idx=0, sparse=True),
        ["weight"],
        lambda m: m(torch.tensor([[1, 0, 2]])),
    ),
    "a bare parameter": (Bare, ["proj"], lambda m: m(X)),
    "an adaptive softmax": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(64, 1000, [100, 500]),
        ["head", "tail.0.0"],
        lambda m: m.log_prob(X[0]),
    ),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case", FIT)
def test_these_work(case, grad):
    make, names, run = FIT[case]
    model = make().eval()
    quantize_(model, [(name, rtn_int8(32)) for name in names])
    expected = copy.deepcopy(model)
    dequantize_(expected)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(run(model), run(expected), rtol=1e-4, atol=1e-5)


# -------------------------------------------- GPT-2's linears, [in_features, out_features]


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=32, bos_token_id=1, eos_token_id=2
        )
    )
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    return model.eval()


GPT2 = FqnToConfig({r"re:.*\.(c_attn|c_proj|c_fc)\.weight": rtn_int4(32)})


def test_transposed_linears_by_name(gpt2, tmp_path):
    """Their groups lie along in_features, as those of any linear."""
    ids = torch.randint(3, 100, (2, 9))
    gpt2.save_pretrained(tmp_path / "float")
    expected = RTNQuantizedTensor.from_float(gpt2.transformer.h[0].attn.c_attn.weight.detach().mT, 4, 32)
    rules = [
        (f"transformer.h.{i}.{name}", rtn_int4(32))
        for i in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert bits_per_weight(gpt2, rules) == 5
    by_torchao, by_rules = copy.deepcopy(gpt2), copy.deepcopy(gpt2)
    quantize_(gpt2, GPT2)
    quantize_(by_rules, rules)
    torchao.quantization.quantize_(by_torchao, GPT2, filter_fn=None)
    w = gpt2.transformer.h[0].attn.c_attn.weight
    assert (w.shape, w.transposed) == ((64, 192), True)
    assert torch.equal(w.qdata, expected.qdata)
    dense = copy.deepcopy(gpt2)
    dequantize_(dense)
    save(gpt2, tmp_path / "saved")
    with torch.no_grad():
        logits = gpt2(ids).logits
        torch.testing.assert_close(logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
        for other in (
            by_torchao,
            by_rules,
            load(tmp_path / "float", GPT2),
            load(tmp_path / "saved"),
            AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
            AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=TorchAoConfig(GPT2)),
        ):
            assert torch.equal(other(ids).logits, logits)
