"""Modules beside nn.Linear that multiply by their weights, and those of which the report says why they stay
float."""

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from rtn_tensor import RTNQuantizedTensor, dequantize_, load, quantize_, report, rtn_int4, rtn_int8, save

SMALL = 4096  # numbers, of which a weight may be float without a word


def quantized(model):
    return {name for name, p in model.named_parameters() if isinstance(p, RTNQuantizedTensor)}


def same_as_dequantized(model, run):
    expected = copy.deepcopy(model)
    dequantize_(expected)
    torch.testing.assert_close(run(model), run(expected), rtol=1e-4, atol=1e-4)


def assert_complete(result):
    """Every large weight that stays float has a reason."""
    large = [row for row in result.rows if len(row.shape) > 1 and torch.Size(row.shape).numel() > SMALL]
    assert large
    assert not [row.name for row in large if row.bits is None and not row.note]


# --------------------------------------------------------------------------- nn.MultiheadAttention

X, Y = torch.randn(3, 12, 64, generator=torch.Generator().manual_seed(0)).split([5, 7], 1)
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
IN_AND_OUT = {"in_proj_weight", "out_proj.weight"}


def attention(**options):
    return nn.MultiheadAttention(64, 4, batch_first=True, **options)


class CLIPBlock(nn.Module):
    """As OpenAI's and open_clip's, whose sequences come first."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(64, 4)
        self.ln = nn.LayerNorm(64)
        self.mlp = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
        self.mask = torch.full((5, 5), float("-inf")).triu(1)

    def forward(self, x):
        x = x.transpose(0, 1)
        y = self.ln(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.mask)[0]
        return (x + self.mlp(x)).transpose(0, 1)


ATTENTION = {
    "self": (attention, IN_AND_OUT, lambda m: m(X, X, X)[0]),
    "weights": (attention, IN_AND_OUT, lambda m: m(X, X, X, need_weights=True)[1]),
    "cross": (attention, IN_AND_OUT, lambda m: m(X, Y, Y)[0]),
    "three inputs": (attention, IN_AND_OUT, lambda m: m(X, Y, Y + 1)[0]),
    "padding": (attention, IN_AND_OUT, lambda m: m(X, X, X, key_padding_mask=PADDING)[0]),
    "no bias": (lambda: attention(bias=False), IN_AND_OUT, lambda m: m(X, X, X)[0]),
    "extra key": (lambda: attention(add_bias_kv=True), IN_AND_OUT, lambda m: m(X, X, X)[0]),
    "other keys": (
        lambda: attention(kdim=32, vdim=96),
        {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"},
        lambda m: m(X, Y[..., :32], torch.cat([Y, Y], -1)[..., :96])[0],
    ),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True),
        {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"},
        lambda m: m(X, src_key_padding_mask=PADDING),
    ),
    "norm first": (
        lambda: nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True, norm_first=True),
        {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"},
        lambda m: m(X),
    ),
    "CLIP": (
        CLIPBlock,
        {"attn.in_proj_weight", "attn.out_proj.weight", "mlp.0.weight", "mlp.2.weight"},
        lambda m: m(X),
    ),
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case, train, bits):
    make, names, run = ATTENTION[case]
    torch.manual_seed(0)
    model = make().train(train)
    result = quantize_(model, {4: rtn_int4, 8: rtn_int8}[bits](32))
    assert quantized(model) == names
    assert_complete(result)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            same_as_dequantized(model, run)
    with torch.autocast("cpu", torch.bfloat16):
        expected = copy.deepcopy(model)
        dequantize_(expected)
        torch.testing.assert_close(run(model).float(), run(expected).float(), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("float_layer", [0, 1])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_of_which_a_layer_stays_float(float_layer):
    layer = nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    quantize_(model, [(f"layers.{float_layer}.*", None), ("*", rtn_int4(32))])
    with torch.no_grad():
        same_as_dequantized(model, lambda m: m(X, src_key_padding_mask=PADDING)[~PADDING])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_transformer_encoder(train, nested):
    """Its fast path, an op of C++ that would read the weights' memory, is not taken."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).train(train)
    quantize_(model, rtn_int8(32))
    assert len(quantized(model)) == 8
    kept = ~PADDING
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            # What it computes of padding differs from path to path.
            same_as_dequantized(model, lambda m: m(X, src_key_padding_mask=PADDING)[kept])
            same_as_dequantized(model, lambda m: m(X))


def test_transformer():
    torch.manual_seed(0)
    model = nn.Transformer(64, 4, 1, 1, 96, dropout=0.0, batch_first=True).eval()
    quantize_(model, rtn_int8(32))
    assert len(quantized(model)) == 10
    with torch.no_grad():
        same_as_dequantized(model, lambda m: m(X, Y))


def test_attention_saved_compiled_and_trained_through(tmp_path):
    model = CLIPBlock().eval()
    quantize_(model, rtn_int4(32))
    save(model, tmp_path / "saved")
    again = load(tmp_path / "saved", model=CLIPBlock).eval()
    state = CLIPBlock().eval()
    quantize_(state, rtn_int4(32))
    state.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(X), model(X))
        assert torch.equal(state(X), model(X))
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(X), model(X), rtol=1e-4, atol=1e-5)
    dense = copy.deepcopy(model)
    dequantize_(dense)
    gradients = []
    for m in (model, dense):
        x = X.clone().requires_grad_()
        m(x).square().sum().backward()
        gradients += [x.grad, m.attn.in_proj_bias.grad]
    torch.testing.assert_close(gradients[:2], gradients[2:], rtol=1e-4, atol=1e-4)


MASKS = {
    "none": {},
    "causal": {"src_mask": torch.full((5, 5), True).triu(1)},
    "padding": {"src_key_padding_mask": PADDING},
    "both": {"src_mask": torch.full((5, 5), True).triu(1), "src_key_padding_mask": PADDING},
}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masks", MASKS)
def test_compiled_encoder(masks, norm_first):
    """A compiler takes the fast path, whose op is taken apart."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        64, 4, 96, batch_first=True, norm_first=norm_first, activation="gelu" if norm_first else "relu"
    ).eval()
    quantize_(layer, rtn_int8(32))
    expected = copy.deepcopy(layer)
    dequantize_(expected)
    torch.compiler.reset()
    with torch.no_grad():
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(X, **MASKS[masks])
        torch.testing.assert_close(y[~PADDING], expected(X, **MASKS[masks])[~PADDING], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_compiled_attention(need_weights, average):
    torch.manual_seed(0)
    model = attention().eval()
    quantize_(model, rtn_int8(32))
    expected = copy.deepcopy(model)
    dequantize_(expected)
    torch.compiler.reset()

    def run(m, x):
        return m(x, x, x, PADDING, need_weights=need_weights, average_attn_weights=average)

    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(model, X), run(expected, X), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_the_op_of_attention_of_other_keys_and_nested():
    torch.manual_seed(0)
    model = attention().eval()
    quantize_(model, rtn_int8(32))
    expected = copy.deepcopy(model)
    dequantize_(expected)

    def run(m, q, k, v):
        weights = m.in_proj_weight, m.in_proj_bias, m.out_proj.weight, m.out_proj.bias
        return torch._native_multi_head_attention(q, k, v, 64, 4, *weights)[0]

    with torch.no_grad():
        torch.testing.assert_close(run(model, X, X + 1, X + 2), run(expected, X, X + 1, X + 2))
        nested = torch.nested.nested_tensor(list(X))
        with pytest.raises(
            NotImplementedError, match="in_proj_weight: nested sequences are for float weights"
        ):
            run(model, nested, nested, nested)


def test_attention_of_a_float_folder(tmp_path):
    model = CLIPBlock().eval()
    save(model, tmp_path / "float")
    streamed = load(tmp_path / "float", rtn_int8(32), model=CLIPBlock).eval()
    quantize_(model, rtn_int8(32))
    assert quantized(streamed) == quantized(model)
    with torch.no_grad():
        assert torch.equal(streamed(X), model(X))


def test_attention_by_rules_and_filters():
    model = CLIPBlock()
    quantize_(model, [("attn.out_proj", None), ("attn", rtn_int4(32)), ("*", rtn_int8(32))])
    assert model.attn.in_proj_weight.bits == 4
    assert quantized(model) == {"attn.in_proj_weight", "mlp.0.weight", "mlp.2.weight"}
    model = CLIPBlock()
    quantize_(model, rtn_int8(32), lambda module, name: name == "attn")
    assert quantized(model) == {"attn.in_proj_weight"}


def test_pretrained_with_torchs_attention(tmp_path):
    """SigLIP pools by one."""
    config = transformers.SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    model = transformers.SiglipVisionModel(config).eval()
    model.save_pretrained(tmp_path / "float")
    expected = copy.deepcopy(model)
    result = quantize_(expected, rtn_int8(32))
    assert_complete(result)
    assert any(name.endswith("head.attention.in_proj_weight") for name in quantized(expected))
    save(expected, tmp_path / "saved")
    expected.save_pretrained(tmp_path / "by_transformers")
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        y = expected(pixels).pooler_output
        same_as_dequantized(expected, lambda m: m(pixels).pooler_output)
        for other in (
            load(tmp_path / "float", rtn_int8(32)),
            load(tmp_path / "saved"),
            transformers.SiglipVisionModel.from_pretrained(tmp_path / "saved"),
            transformers.SiglipVisionModel.from_pretrained(tmp_path / "by_transformers"),
        ):
            assert torch.equal(other(pixels).pooler_output, y)


# ------------------------------------------------------------------------------ why it stays float


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Parameter(torch.randn(96, 64))
        self.kernel = nn.Parameter(torch.randn(8, 8, 8, 16))
        self.table = nn.Parameter(torch.zeros(80, 64, dtype=torch.int8), requires_grad=False)


def old_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(96, 64))


FLOATS = {
    "conv1d": (lambda: nn.Conv1d(64, 32, 3), "weight of a Conv1d: no kernel"),
    "conv2d": (lambda: nn.Conv2d(64, 32, 3), "weight of a Conv2d: no kernel"),
    "conv3d": (lambda: nn.Conv3d(64, 32, 3), "weight of a Conv3d: no kernel"),
    "patches": (lambda: nn.Conv2d(3, 64, 16, 16), "weight of a Conv2d: no kernel"),
    "transposed conv": (lambda: nn.ConvTranspose2d(64, 32, 3), "weight of a ConvTranspose2d: no kernel"),
    "lstm": (lambda: nn.LSTM(64, 64, bidirectional=True), "weight of an LSTM: no kernel"),
    "gru": (lambda: nn.GRU(64, 64), "weight of a GRU: no kernel"),
    "rnn": (lambda: nn.RNN(64, 96), "weight of an RNN: no kernel"),
    "cell": (lambda: nn.GRUCell(64, 64), "only by its full name"),
    "bilinear": (lambda: nn.Bilinear(32, 32, 32), "weight of a Bilinear: no kernel"),
    "bag": (lambda: nn.EmbeddingBag(96, 64), "weight of an EmbeddingBag: no kernel"),
    "embedding": (lambda: nn.Embedding(96, 64), "not selected"),
    "clipped embedding": (lambda: nn.Embedding(96, 64, max_norm=1.0), "max_norm"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(96, 64)), "computes another weight"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(96, 64)), "computes another weight"),
    "normed conv": (lambda: parametrizations.weight_norm(nn.Conv1d(64, 32, 3)), "computes another weight"),
    "old weight norm": (old_norm, "computes another weight"),
    "norm": (lambda: nn.LayerNorm([80, 64]), "weight of a LayerNorm: no kernel"),
    "odd": (Odd, "use not known|dims|int8"),
}


@pytest.mark.parametrize("case", FLOATS)
def test_why_it_stays_float(case):
    make, why = FLOATS[case]
    model = nn.ModuleDict({"linear": nn.Linear(96, 64), "odd": make()})
    # A linear whose weight is computed is refused, unless it is left out.
    normed = isinstance(model["odd"], nn.Linear)
    result = quantize_(model, rtn_int8(32), (lambda module, name: name == "linear") if normed else None)
    assert quantized(model) == {"linear.weight"}
    assert_complete(result)
    rows = [row for row in result.rows if row.name.startswith("odd.") and len(row.shape) > 1]
    large = [row for row in rows if torch.Size(row.shape).numel() > SMALL]
    assert large
    for row in large:
        assert any(part in row.note for part in why.split("|")), row
    assert str(report(model)).count(large[0].note) >= 1


# --------------------------------------------------------------------------------- GPT-2's linears


GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 32}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))


def gpt2():
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, **SPECIAL)).eval()
    for p in model.parameters():
        p.data.normal_(std=0.1)
    return model


def test_gpt2_is_quantized_and_smaller(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path / "float")
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, Conv1D)}
    result = quantize_(model, rtn_int4(32))
    assert quantized(model) == linears | {"lm_head.weight"}
    assert result.bytes_after < 0.3 * result.bytes_before
    assert_complete(result)
    streamed = load(tmp_path / "float", rtn_int4(32))
    assert quantized(streamed) == linears
    assert streamed.lm_head.weight is streamed.transformer.wte.weight
    with torch.no_grad():
        same_as_dequantized(model, lambda m: m(IDS).logits)
        same_as_dequantized(streamed, lambda m: m(IDS).logits)
        compiled = torch.compile(model, fullgraph=True)(IDS).logits
        torch.testing.assert_close(compiled, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_small_gpt2_of_a_large_vocabulary_gets_no_larger():
    """Its output layer would get a copy that takes more than all others save; in full, a rule gives it one."""
    sizes = GPT2 | SPECIAL | {"vocab_size": 20000}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    rows = {row.name: row for row in quantize_(copy.deepcopy(model), rtn_int4(32)).rows}
    assert rows["lm_head.weight"].bits is None
    assert rows["lm_head.weight"].note == "shared with transformer.wte.weight"
    for rules in (rtn_int4(32), [("*", rtn_int4(32))]):
        result = quantize_(small := copy.deepcopy(model), rules)
        assert result.bytes_after < result.bytes_before
        assert len(quantized(small)) == 8
    quantize_(model, [("lm_head", rtn_int4(32)), ("*", rtn_int8(32))])
    assert model.lm_head.weight.bits == 4
    assert not isinstance(model.transformer.wte.weight, RTNQuantizedTensor)


@pytest.mark.parametrize("name", ["OpenAIGPT", "ImageGPT", "DecisionTransformer"])
def test_others_with_gpt2s_linears(name):
    sizes = {**GPT2, **SPECIAL, "hidden_size": 64}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    result = quantize_(model, rtn_int8(32))
    assert {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, Conv1D)} <= quantized(model)
    assert_complete(result)
    if name != "DecisionTransformer":
        with torch.no_grad():
            same_as_dequantized(model, lambda m: m(IDS)[0])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_on_gpt2():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = gpt2()
    quantize_(model, rtn_int8(32))
    dense = copy.deepcopy(model)
    dequantize_(dense)
    gradients = []
    for i, base in enumerate((model, dense)):
        adapted = peft.get_peft_model(base, config)
        torch.manual_seed(1)
        factors = [p for n, p in adapted.named_parameters() if "lora_" in n]
        for p in factors:
            p.data.normal_(std=0.05)
        logits = adapted(IDS).logits
        logits.square().mean().backward()
        gradients.append([logits.detach(), *(p.grad for p in factors)])
        if i == 0:
            with pytest.raises(ValueError, match="c_attn.weight: PEFT merges no adapter into .* Conv1D"):
                adapted.merge_and_unload()
            assert adapted(IDS).logits.isfinite().all()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")
def test_lora_on_torchs_attention_is_refused():
    """PEFT merges it at every call, and would leave a float weight behind."""
    peft = pytest.importorskip("peft")
    block = CLIPBlock()
    quantize_(block, rtn_int8(32))
    model = peft.get_peft_model(block, peft.LoraConfig(r=4, target_modules=["attn"]))
    with pytest.raises(NotImplementedError, match=r"by the rule \('attn.in_proj_weight', None\)"):
        model(X)
    block = CLIPBlock()
    quantize_(block, [("attn", None), ("attn.out_proj", None), ("*", rtn_int8(32))])
    model = peft.get_peft_model(block, peft.LoraConfig(r=4, target_modules=["attn"]))
    model(X).sum().backward()


# ----------------------------------------------------------------------------------------- experts


EXPERTS = {
    "Dbrx": (
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 1,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        },
        ["experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2"],
    ),
    "JetMoe": (
        {
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_key_value_heads": 2,
            "kv_channels": 16,
            "intermediate_size": 96,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        [
            "mlp.input_linear.weight",
            "mlp.output_linear.weight",
            "experts.input_linear.weight",
            "experts.output_linear.weight",
        ],
    ),
    "LongcatFlash": (
        {
            "hidden_size": 64,
            "num_layers": 1,
            "num_attention_heads": 4,
            "ffn_hidden_size": 96,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "head_dim": 16,
            "moe_topk": 2,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "expert_ffn_hidden_size": 48,
        },
        ["experts.gate_up_proj", "experts.down_proj"],
    ),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name, tmp_path):
    sizes, experts = EXPERTS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=128, **sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.1)
    model.save_pretrained(tmp_path / "float")
    result = quantize_(model, rtn_int8(32))
    for expert in experts:
        assert any(row.name.endswith(expert) and row.bits for row in result.rows), expert
    assert_complete(result)
    assert {row.note for row in result.rows if "router" in row.name and len(row.shape) > 1} == {"router"}
    save(model, tmp_path / "saved")
    with torch.no_grad():
        logits = model(IDS).logits
        same_as_dequantized(model, lambda m: m(IDS).logits)
        assert torch.equal(load(tmp_path / "saved")(IDS).logits, logits)
        assert torch.equal(type(model).from_pretrained(tmp_path / "saved")(IDS).logits, logits)
        streamed = load(tmp_path / "float", rtn_int8(32))
        assert quantized(streamed) == quantized(model) - {"lm_head.weight"}
        same_as_dequantized(streamed, lambda m: m(IDS).logits)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.filterwarnings("ignore:Graph break from `Tensor.item")
def test_compiled_experts(name):
    """LongCat's loop over experts is a frame that Dynamo gives up; docs/compile-and-export.md says what it
    takes."""
    sizes, _ = EXPERTS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=128, **sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    quantize_(model, rtn_int8(32))
    torch.compiler.reset()
    with torch.no_grad():
        dynamic = False if name == "LongcatFlash" else None
        compiled = torch.compile(model, backend="aot_eager", dynamic=dynamic)
        expected = model(IDS, use_cache=False).logits
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_heads_that_einsum_takes_stay_float():
    config = transformers.XLNetConfig(d_model=64, n_layer=1, n_head=4, d_inner=96, vocab_size=128)
    model = transformers.XLNetModel(config).eval()
    result = quantize_(model, rtn_int8(32))
    rows = {row.name: row for row in result.rows}
    assert rows["layer.0.rel_attn.q"].bits is None
    assert rows["layer.0.rel_attn.q"].note == "weight of an XLNetRelativeAttention: use not known"
    assert_complete(result)
    with torch.no_grad():
        same_as_dequantized(model, lambda m: m(IDS)[0])
