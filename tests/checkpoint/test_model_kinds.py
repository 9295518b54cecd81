"""Encoders, encoder-decoders, vision, diffusion and mixture-of-experts models: `load` gives each what
`quantize_` and transformers give."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from kinds_of_models import (
    KINDS,
    TRANSFORMERS,
    UNetBlock,
    among,
    assert_same,
    error,
    linears,
    make,
    output,
    quantized,
    quantized_float,
    read,
    read_float,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.quantization import FqnToConfig
from transformers import AutoModel, AutoTokenizer, TorchAoConfig

from benchmarks.downloads import ModelUnavailable
from benchmarks.real_model import minilm
from rtn_tensor import RTNQuantizedTensor, load, quantize_, report, rtn_int4, rtn_int8, save


@pytest.fixture
def folder(tmp_path):
    """Makes a checkpoint of the float model."""

    def write(name):
        model, path = make(name), tmp_path / "float"
        model.save_pretrained(path) if name in TRANSFORMERS else save(model, path)
        return path

    return write


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
            assert (row.bits, row.note) == (None, f"weight of a {type(owner).__name__}: no kernel")


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
-----------------------------  ---------------  -----  -----  ------------  -----------  -----------------------------
time_embedding.weight                  64 x 32      8     32         8,192        2,304
resnet.conv1.weight            32 x 16 x 3 x 3  float               18,432       18,432  weight of a Conv2d: no kernel
resnet.time_emb_proj.weight            32 x 64      8     32         8,192        2,304
resnet.conv2.weight            32 x 32 x 3 x 3  float               36,864       36,864  weight of a Conv2d: no kernel
resnet.conv_shortcut.weight    32 x 16 x 1 x 1  float                2,048        2,048  weight of a Conv2d: no kernel
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
downsample.weight              32 x 32 x 3 x 3  float               36,864       36,864  weight of a Conv2d: no kernel
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
