"""Encoders, encoder-decoders, vision, diffusion and mixture-of-experts models: `load` gives each what
`quantize_` and transformers give."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
import transformers
from expecttest import assert_expected_inline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.quantization import FqnToConfig
from transformers import AutoModel, AutoTokenizer, TorchAoConfig

from benchmarks.real_model import ModelUnavailable, minilm
from rtn_tensor import RTNQuantizedTensor, load, quantize_, report, rtn_int4, rtn_int8, save
from rtn_tensor.quantize.experts import transposed_experts

# -------------------------------------------------------------------------------- the kinds


class Resnet(nn.Module):
    """As in diffusers: two convolutions, the time step added between them."""

    def __init__(self, inputs, outputs, time):
        super().__init__()
        self.norm1 = nn.GroupNorm(4, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, outputs)
        self.norm2 = nn.GroupNorm(4, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(time))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, width, context):
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x, context):
        q, k, v = (
            y.unflatten(-1, (4, -1)).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Over the pixels: self-attention, cross-attention to a text, GEGLU."""

    def __init__(self, width, context):
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.proj_in = nn.Linear(width, width)
        self.attn1 = Attention(width, width)
        self.attn2 = Attention(width, context)
        self.ff_in = nn.Linear(width, 8 * width)
        self.ff_out = nn.Linear(4 * width, width)
        self.proj_out = nn.Linear(width, width)

    def forward(self, x, context):
        h = self.proj_in(self.norm(x).flatten(2).mT)
        h = h + self.attn1(h, h)
        h = h + self.attn2(h, context)
        value, gate = self.ff_in(h).chunk(2, dim=-1)
        h = h + self.ff_out(value * F.gelu(gate))
        return x + self.proj_out(h).mT.unflatten(-1, x.shape[-2:])


class UNetBlock(nn.Module):
    """A down block of a diffusers UNet, with its time embedding, whose frequencies are a buffer that no
    checkpoint holds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.exp(-torch.arange(16) / 4), persistent=False)
        self.time_embedding = nn.Linear(32, 64)
        self.resnet = Resnet(16, 32, 64)
        self.attention = Transformer(32, 48)
        self.downsample = nn.Conv2d(32, 32, 3, stride=2, padding=1)

    def forward(self, sample, timestep, context):
        angle = timestep[:, None] * self.frequencies
        time = self.time_embedding(torch.cat([angle.cos(), angle.sin()], dim=-1))
        return (self.downsample(self.attention(self.resnet(sample, time), context)),)


@dataclass(frozen=True)
class Kind:
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    # The linear layers that `load` leaves float, by the last part of their names.
    floats: set[str] = field(default_factory=set)


def small(kind, config, **options):
    return lambda: getattr(transformers, kind)(getattr(transformers, config)(**options))


def ids(**more):
    return lambda: {
        "input_ids": torch.randint(2, 128, (2, 9)),
        **{name: make() for name, make in more.items()},
    }


HEADS = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
MOE = HEADS | {"num_key_value_heads": 2, "vocab_size": 128, "num_experts_per_tok": 2}
KINDS = {
    "bert": Kind(small("BertForMaskedLM", "BertConfig", **HEADS, vocab_size=128), ids(), {"decoder"}),
    "vit": Kind(
        small("ViTForImageClassification", "ViTConfig", **HEADS, image_size=32, patch_size=8, num_labels=10),
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
    ),
    "swin": Kind(
        small(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            patch_size=2,
            embed_dim=32,
            depths=[2, 1],
            num_heads=[2, 4],
            window_size=4,
        ),
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
    ),
    "resnet": Kind(
        small(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=16,
            hidden_sizes=[16, 32],
            depths=[1, 1],
            layer_type="basic",
            num_labels=10,
        ),
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
    ),
    "whisper": Kind(
        small(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=128,
            num_mel_bins=16,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            max_source_positions=20,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            decoder_start_token_id=1,
        ),
        lambda: {
            "input_features": torch.randn(2, 16, 40),
            "decoder_input_ids": torch.randint(2, 128, (2, 9)),
        },
        {"proj_out"},
    ),
    "t5": Kind(
        small(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=128,
            d_model=64,
            d_kv=8,
            # It does not scale attention: with larger weights each query would look at one key only.
            initializer_factor=0.4,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        ),
        ids(decoder_input_ids=lambda: torch.randint(2, 128, (2, 7))),
        {"lm_head", "wo"},
    ),
    "mixtral": Kind(
        small("MixtralForCausalLM", "MixtralConfig", **MOE, num_local_experts=12), ids(), {"lm_head"}
    ),
    "qwen3 moe": Kind(
        small(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            **MOE,
            head_dim=16,
            moe_intermediate_size=48,
            num_experts=12,
        ),
        ids(),
        {"lm_head"},
    ),
    "unet": Kind(
        UNetBlock,
        lambda: {
            "sample": torch.randn(2, 16, 8, 8),
            "timestep": torch.tensor([3.0, 41.0]),
            "context": torch.randn(2, 5, 48),
        },
    ),
}
TRANSFORMERS = [name for name in KINDS if name != "unet"]


def make(name):
    """The float model, no parameter or buffer of it as its constructor leaves it: whatever a load forgets
    shows."""
    torch.manual_seed(0)
    model = KINDS[name].make().eval()
    for fqn, t in model.state_dict().items():
        if fqn.endswith("running_var"):
            t.mul_(0.5 + torch.rand_like(t))
        elif t.is_floating_point():
            t.add_(torch.randn_like(t), alpha=0.15 * (1 + t.std(correction=0)))
    return model


@pytest.fixture
def folder(tmp_path):
    """Makes a checkpoint of the float model."""

    def write(name):
        model, path = make(name), tmp_path / "float"
        model.save_pretrained(path) if name in TRANSFORMERS else save(model, path)
        return path

    return write


def read(name, path, *args, **more):
    return load(path, *args, **more, **({} if name in TRANSFORMERS else {"model": UNetBlock})).eval()


def read_float(name, path, **more):
    """By transformers, and not by us."""
    return type(make(name)).from_pretrained(path, **more) if name in TRANSFORMERS else make(name)


@torch.inference_mode()
def output(name, model):
    torch.manual_seed(1)
    dtype = model.dtype if name in TRANSFORMERS else torch.float32
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in KINDS[name].inputs().items()}
    return model(**inputs)[0]


def error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def linears(model, floats):
    """All but those whose last name is among `floats`; and modules of experts."""
    modules = {
        fqn
        for fqn, module in model.named_modules()
        if isinstance(module, nn.Linear) or transposed_experts(module)
    }
    return {fqn for fqn in modules if fqn.rpartition(".")[2] not in floats}


def quantized(model):
    return {
        fqn.rpartition(".")[0] for fqn, w in model.named_parameters() if isinstance(w, RTNQuantizedTensor)
    }


def among(names):
    return lambda module, fqn: fqn in names


def quantized_float(name, path, config):
    model = read_float(name, path)
    quantize_(model, config, among(linears(model, KINDS[name].floats)))
    return model


def assert_same(name, loaded, model):
    """Every parameter, every buffer (those that no checkpoint holds, too), and the answer, bit for bit."""
    for what in ("named_parameters", "named_buffers"):
        expected, got = (dict(getattr(m, what)(remove_duplicate=False)) for m in (model, loaded))
        assert list(got) == list(expected)
        for fqn, t in expected.items():
            assert (type(got[fqn]), got[fqn].dtype) == (type(t), t.dtype), fqn
            if isinstance(t, RTNQuantizedTensor):
                assert (got[fqn].bits, got[fqn].group_size, got[fqn].scale_method) == (
                    t.bits,
                    t.group_size,
                    t.scale_method,
                ), fqn
                assert torch.equal(got[fqn].qdata, t.qdata), fqn
                assert torch.equal(got[fqn].scale, t.scale), fqn
            else:
                assert torch.equal(got[fqn], t), fqn
    assert torch.equal(output(name, loaded), output(name, model))


# ------------------------------------------------------------------------------------ load


@pytest.mark.parametrize("name", KINDS)
def test_float(name, folder):
    path = folder(name)
    assert_same(name, read(name, path), read_float(name, path))
    assert_same(name, read(name, path), make(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_dtype(name, dtype, folder, tmp_path):
    """What transformers keeps in fp32 (tables of frequencies; T5's `wo`, were all else fp16) stays so."""
    path = folder(name)
    model = read_float(name, path, dtype=dtype)
    assert_same(name, read(name, path, dtype=dtype), model)
    quantize_(model, rtn_int8(32), among(linears(model, KINDS[name].floats)))
    loaded = read(name, path, rtn_int8(32), dtype=dtype)
    assert_same(name, loaded, model)
    save(loaded, tmp_path / "quantized")
    assert_same(name, read(name, tmp_path / "quantized"), model)


OLD_BUFFERS = {
    "bert": ("bert.embeddings.position_ids", torch.arange(512)[None]),
    "mixtral": ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.rand(8)),
}


@pytest.mark.parametrize("name", OLD_BUFFERS)
def test_checkpoint_with_a_buffer_that_is_computed_now(name, folder):
    path = folder(name)
    key, value = OLD_BUFFERS[name]
    save_file(
        load_file(path / "model.safetensors") | {key: value}, path / "model.safetensors", {"format": "pt"}
    )
    assert_same(name, read(name, path, rtn_int8(32)), quantized_float(name, path, rtn_int8(32)))


@pytest.mark.parametrize("config", [rtn_int8(32), rtn_int4(32)], ids=["int8", "int4"])
@pytest.mark.parametrize("name", KINDS)
def test_as_quantize_does(name, config, folder):
    path = folder(name)
    loaded = read(name, path, config)
    assert quantized(loaded) == linears(loaded, KINDS[name].floats)
    assert_same(name, loaded, quantized_float(name, path, config))
    for row in report(loaded).rows:
        owner = loaded.get_submodule(row.name.rpartition(".")[0])
        if isinstance(owner, nn.Conv1d | nn.Conv2d) and len(row.shape) > 1:
            assert (row.bits, row.note) == (None, f"weight of a {type(owner).__name__}")


@pytest.mark.parametrize("name", KINDS)
def test_noise(name, folder):
    """int8 is within a bound that int4 is not within, nor int8 with the rows of any one layer in the wrong
    places."""
    path = folder(name)
    expected = output(name, make(name))
    model = read(name, path, rtn_int8(32))
    noise, int4 = (
        error(output(name, model), expected),
        error(output(name, read(name, path, rtn_int4(32))), expected),
    )
    broken = {}
    for fqn, w in model.named_parameters():
        if isinstance(w, RTNQuantizedTensor):
            before = w.qdata.clone()
            w.qdata.copy_(before.roll(1, -2))
            broken[fqn] = error(output(name, model), expected)
            w.qdata.copy_(before)
    least = min(broken, key=broken.get)
    print(f"{name}: int8 {noise:.4f}, int4 {int4:.4f}, broken {broken[least]:.4f} at least ({least})")
    assert noise < 0.035
    assert int4 > 0.06
    assert broken[least] > 0.06, least


# ------------------------------------------------------------------- transformers and back


# To quantize while it loads, transformers asks any model for its input embedding; a ResNet raises at that.
EMBEDDING = [name for name in TRANSFORMERS if name != "resnet"]


@pytest.mark.parametrize("name", EMBEDDING)
def test_transformers_quantizes_the_same(name, folder, tmp_path):
    path = folder(name)
    model = type(make(name)).from_pretrained(path, quantization_config=TorchAoConfig(rtn_int8(32)))
    # It means to leave T5's `wo` float, but compares that with the name of the weight, not of the layer.
    # Experts it quantizes by name only.
    assert quantized(model) == linears(model, (KINDS[name].floats | {"experts"}) - {"wo"})
    assert_same(name, model, read(name, path, rtn_int8(32), filter_fn=among(quantized(model))))
    model.save_pretrained(tmp_path / "theirs")
    assert_same(name, read(name, tmp_path / "theirs"), model)


@pytest.mark.parametrize("name", KINDS)
def test_round_trip(name, folder, tmp_path):
    model = read(name, folder(name), rtn_int4(32, "signed"))
    save(model, tmp_path / "quantized")
    assert_same(name, read(name, tmp_path / "quantized"), model)
    if name in TRANSFORMERS:
        assert_same(name, type(model).from_pretrained(tmp_path / "quantized"), model)


# ---------------------------------------------------------------------------- convolutions


def test_report_of_convolutions(folder):
    model = read("unet", folder("unet"), rtn_int8(32))
    assert_expected_inline(
        str(report(model)),
        """\
weight                                   shape   bits  group  bytes before  bytes after  note
-----------------------------  ---------------  -----  -----  ------------  -----------  ------------------
time_embedding.weight                  64 x 32      8     32         8,192        2,304
resnet.conv1.weight            32 x 16 x 3 x 3  float               18,432       18,432  weight of a Conv2d
resnet.time_emb_proj.weight            32 x 64      8     32         8,192        2,304
resnet.conv2.weight            32 x 32 x 3 x 3  float               36,864       36,864  weight of a Conv2d
resnet.conv_shortcut.weight    32 x 16 x 1 x 1  float                2,048        2,048  weight of a Conv2d
attention.proj_in.weight               32 x 32      8     32         4,096        1,152
attention.attn1.to_q.weight            32 x 32      8     32         4,096        1,152
attention.attn1.to_k.weight            32 x 32      8     32         4,096        1,152
attention.attn1.to_v.weight            32 x 32      8     32         4,096        1,152
attention.attn1.to_out.weight          32 x 32      8     32         4,096        1,152
attention.attn2.to_q.weight            32 x 32      8     32         4,096        1,152
attention.attn2.to_k.weight            32 x 48      8     32         6,144        1,792
attention.attn2.to_v.weight            32 x 48      8     32         6,144        1,792
attention.attn2.to_out.weight          32 x 32      8     32         4,096        1,152
attention.ff_in.weight                256 x 32      8     32        32,768        9,216
attention.ff_out.weight               32 x 128      8     32        16,384        4,608
attention.proj_out.weight              32 x 32      8     32         4,096        1,152
downsample.weight              32 x 32 x 3 x 3  float               36,864       36,864  weight of a Conv2d
18 vectors                                      float                3,200        3,200  norms and biases
total                                           19.79              208,000      128,640""",
    )


class DiffusersBlock(UNetBlock):
    """diffusers' models have a config and a save_pretrained, too, but none of transformers' other methods."""

    def __init__(self):
        super().__init__()
        self.config = {"in_channels": 16}

    def save_pretrained(self, path):
        raise NotImplementedError


@pytest.mark.parametrize("config", [None, rtn_int8(32)], ids=["float", "int8"])
def test_a_model_of_another_library(config, folder, tmp_path):
    path = folder("unet")
    model = load(path, config, model=DiffusersBlock).eval()
    assert_same("unet", model, read("unet", path, config))
    save(model, tmp_path / "saved")
    assert_same("unet", load(tmp_path / "saved", model=DiffusersBlock).eval(), model)


# --------------------------------------------------------------------------------- experts


EXPERTS = FqnToConfig(
    {r"re:.*\.experts\.(gate_up|down)_proj": rtn_int8(32), r"re:.*self_attn\.[qkvo]_proj": rtn_int8(-1)}
)
MOES = {
    "mixtral": (
        "model.layers.0.block_sparse_moe.experts.10.w1.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
    ),
    "qwen3 moe": (
        "model.layers.0.mlp.experts.10.gate_proj.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
    ),
}


@pytest.mark.parametrize("name", MOES)
def test_experts(name, folder, tmp_path):
    """A checkpoint holds each expert's tensors, of which transformers makes one parameter; they are quantized
    into their place in it."""
    path = folder(name)
    one, fused = MOES[name]
    with safe_open(path / "model.safetensors", "pt") as file:
        gate = file.get_tensor(one)
    expected = read_float(name, path)
    assert torch.equal(read(name, path).get_parameter(fused)[10, : len(gate)], gate)

    quantize_(expected, EXPERTS)
    loaded = read(name, path, EXPERTS)
    assert (
        loaded.get_parameter(fused).group_size,
        loaded.model.layers[1].self_attn.k_proj.weight.group_size,
    ) == (32, -1)
    assert torch.equal(
        loaded.get_parameter(fused)[10, : len(gate)].dequantize(),
        RTNQuantizedTensor.from_float(gate, 8, 32).dequantize(),
    )
    assert_same(name, loaded, expected)
    assert error(output(name, loaded), output(name, make(name))) < 0.1

    save(loaded, tmp_path / "quantized")
    assert_same(name, read(name, tmp_path / "quantized"), loaded)
    assert_same(name, type(loaded).from_pretrained(tmp_path / "quantized"), loaded)


@pytest.mark.parametrize("name", MOES)
def test_transformers_quantizes_experts_the_same(name, folder, tmp_path):
    path = folder(name)
    model = type(make(name)).from_pretrained(path, quantization_config=TorchAoConfig(EXPERTS))
    assert_same(name, model, read(name, path, EXPERTS))
    model.save_pretrained(tmp_path / "theirs")
    assert_same(name, read(name, tmp_path / "theirs"), model)


# -------------------------------------------------------------------------- a real encoder


SENTENCES = [
    "A man is playing a guitar.",
    "Someone is making music on a stringed instrument.",
    "The stock market fell sharply on Monday.",
    "Shares lost much of their value at the start of the week.",
    "She is slicing a tomato in the kitchen.",
    "A woman is cutting vegetables.",
    "The rocket lifted off from the launch pad at dawn.",
    "A spacecraft was sent into orbit this morning.",
    "Children are kicking a ball in the park.",
    "Some kids play soccer outdoors.",
    "The court ruled that the contract was void.",
    "Judges declared the agreement invalid.",
]


@pytest.fixture(scope="module")
def minilm_folder():
    try:
        return minilm()
    except ModelUnavailable as unavailable:
        pytest.skip(str(unavailable))


@torch.inference_mode()
def embed(model, path):
    """The mean over a sentence's tokens, of length 1."""
    tokens = AutoTokenizer.from_pretrained(path)(SENTENCES, padding=True, return_tensors="pt")
    mask = tokens["attention_mask"][..., None].float()
    states = model(**tokens).last_hidden_state
    return F.normalize((states * mask).sum(1) / mask.sum(1))


def nearest(embeddings):
    return (embeddings @ embeddings.mT).fill_diagonal_(-1).argmax(1).tolist()


@pytest.mark.slow
def test_minilm(minilm_folder, tmp_path):
    expected = embed(AutoModel.from_pretrained(minilm_folder, dtype=torch.float32).eval(), minilm_folder)
    assert nearest(expected) == [i ^ 1 for i in range(len(SENTENCES))]  # they come in pairs of one meaning

    model = load(minilm_folder, rtn_int8())
    got = embed(model, minilm_folder)
    int8 = (got * expected).sum(1)
    int4 = (embed(load(minilm_folder, rtn_int4(32)), minilm_folder) * expected).sum(1)
    print(
        f"cosines: int8 {int8.min():.5f} at least, int4 {int4.min():.5f} at least, {int4.max():.5f} at most"
    )
    assert int8.min() >= 0.999
    assert 0.9 <= int4.min() < int8.min()
    assert nearest(got) == nearest(expected)

    quantize_(other := AutoModel.from_pretrained(minilm_folder, dtype=torch.float32).eval(), rtn_int8())
    assert torch.equal(embed(other, minilm_folder), got)
    save(model, tmp_path / "int8")
    assert torch.equal(embed(load(tmp_path / "int8"), minilm_folder), got)
