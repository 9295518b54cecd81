"""A small model of each kind, with what it is called on."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from rtn_tensor import RTNQuantizedTensor, load, quantize_
from rtn_tensor.quantize.experts import transposed_experts


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
