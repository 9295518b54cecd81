"""`load`: streams a checkpoint into a model and quantizes on the way."""

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_llama import tiny_llama
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchao.quantization import FqnToConfig
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rtn_tensor import RTNQuantizedTensor, load, quantize_, report, rtn, rtn_int4, rtn_int8, save
from rtn_tensor.checkpoint import fill

IDS = torch.tensor([[5, 77, 130, 9, 201, 64]])


def make_mlp(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(50, 96), nn.Linear(96, 160), nn.BatchNorm1d(160), nn.Linear(160, 33, bias=False)
    ).to(dtype)


def on_meta():
    with torch.device("meta"):
        return make_mlp()


def but_the_output(module, fqn):
    return isinstance(module, nn.Linear) and fqn != "lm_head"


def assert_same(got, expected):
    a, b = got.state_dict(), expected.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert (type(a[name]), a[name].dtype) == (type(b[name]), b[name].dtype), name
        assert torch.equal(a[name], b[name]), name
    for (name, p), (_, q) in zip(got.named_parameters(), expected.named_parameters(), strict=True):
        assert p.requires_grad == q.requires_grad, name


# -------------------------------------------------------------------- transformers folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_the_same_as_quantizing_afterwards(tmp_path, dtype, bits, tied):
    model = tiny_llama(tied, dtype)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, rtn(bits, 64))
    quantize_(model, rtn(bits, 64), but_the_output)
    assert type(loaded) is LlamaForCausalLM
    assert not loaded.training
    assert loaded.config.dtype == dtype
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert_same(loaded, model)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.model.layers[0].mlp.up_proj.weight.fqn == "model.layers.0.mlp.up_proj.weight"
    assert str(report(loaded)) == str(report(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype(tmp_path, dtype):
    tiny_llama(dtype=torch.float16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    quantize_(model, rtn_int4(32), but_the_output)
    assert_same(load(tmp_path, rtn_int4(32), dtype=dtype), model)


def test_without_a_config(tmp_path):
    model = tiny_llama(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_same(load(tmp_path), model)
    assert_same(load(tmp_path, dtype=torch.float32), model.float())


@pytest.mark.parametrize("tied", [False, True])
def test_which_weights(tmp_path, tied):
    model = tiny_llama(tied)
    model.save_pretrained(tmp_path)
    config = FqnToConfig(
        {
            "re:.*q_proj": rtn_int8(32),
            "re:.*mlp.*": rtn_int4(-1, "signed"),
            "model.embed_tokens": rtn_int4(64),
        }
    )
    filtered = load(tmp_path, rtn_int4(32), filter_fn=lambda module, fqn: "down_proj" in fqn)
    assert [row.name for row in report(filtered).rows if row.bits] == [
        f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)
    ]
    mixed = load(tmp_path, config)
    expected = tiny_llama(tied)
    quantize_(expected, config)
    assert_same(mixed, expected)
    assert str(report(mixed)) == str(report(expected))


def test_no_weight_is_selected(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no weight is selected") as caught:
        load(tmp_path, rtn_int4(), filter_fn=lambda module, fqn: False)
    assert caught[0].filename == __file__


def test_shards_and_other_files(tmp_path):
    model = tiny_llama()
    expected = tiny_llama()
    quantize_(expected, rtn_int4(32), but_the_output)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert_same(load(tmp_path / "shards", rtn_int4(32)), expected)
    (tmp_path / "bin").mkdir()
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    assert_same(load(tmp_path / "bin", rtn_int4(32)), expected)


def test_a_loaded_model_saves_and_loads(tmp_path):
    tiny_llama(tied=True, dtype=torch.bfloat16).save_pretrained(tmp_path / "float")
    model = load(tmp_path / "float", rtn_int4(32))
    model.save_pretrained(tmp_path / "theirs")  # transformers' own
    save(model, tmp_path / "ours")
    for name in ("theirs", "ours"):
        assert_same(load(tmp_path / name), model)
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / name), model)


def test_what_is_loaded_maps_the_file_and_does_not_change_it(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "float")
    save(load(tmp_path / "float", rtn_int4(32)), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    before = file.read_bytes()
    model = load(tmp_path / "model")
    w = model.model.layers[0].mlp.up_proj.weight
    maps = [
        line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))
    ]
    spans = [[int(end, 16) for end in line[0].split("-")] for line in maps]
    for plane in (w.qdata, w.scale, model.model.norm.weight):
        assert any(start <= plane.data_ptr() < stop for start, stop in spans)
    w.copy_(torch.randn(w.shape))
    model.model.norm.weight.data.fill_(3)
    assert file.read_bytes() == before


# ------------------------------------------------------------------------------ any module


def test_modules_and_functions_that_make_them(tmp_path):
    expected = make_mlp()
    save_file(expected.state_dict(), tmp_path / "model.safetensors")
    torch.save({"state_dict": expected.state_dict(), "epoch": 3}, tmp_path / "model.pt")
    quantize_(expected, rtn_int8(64))
    given = make_mlp()
    for path, model in (
        (tmp_path, on_meta()),
        (tmp_path / "model.safetensors", make_mlp),
        (tmp_path / "model.pt", on_meta),
        (tmp_path, given),
    ):
        assert_same(load(path, rtn_int8(64), model), expected)
    assert isinstance(given[1].weight, RTNQuantizedTensor)


def test_buffers_that_no_file_holds(tmp_path):
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 32)
            self.register_buffer("frequencies", torch.arange(4.0), persistent=False)

    save_file(Rotary().state_dict(), tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path, rtn_int4(32), Rotary).frequencies, torch.arange(4.0))
    with torch.device("meta"):
        model = Rotary()
    with pytest.raises(
        ValueError,
        match="^frequencies was made on meta and is not in the checkpoint; give, as model, a function",
    ):
        load(tmp_path, rtn_int4(32), model)


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({"qkv_proj": nn.Linear(64, 160), "out_proj": nn.Linear(96, 64)})
        self.mlp = nn.ModuleDict({"gate_up_proj": nn.Linear(64, 256, bias=False)})


def test_rename_and_fuse(tmp_path):
    rows = {"attn.q_proj": 96, "attn.k_proj": 32, "attn.v_proj": 32, "mlp.gate_proj": 128, "mlp.up_proj": 128}
    tensors = {f"h.{name}.weight": torch.randn(n, 64) for name, n in rows.items()}
    tensors |= {f"h.{name}.bias": torch.randn(n) for name, n in rows.items() if "attn" in name}
    tensors |= {"h.attn.out_proj.weight": torch.randn(64, 96), "h.attn.out_proj.bias": torch.randn(64)}
    save_file(tensors, tmp_path / "model.safetensors")
    fuse = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    model = load(tmp_path, rtn_int4(32), Fused, rename={r"^h\.": "", "attn": "attention"}, fuse=fuse)
    qkv, parts = model.attention["qkv_proj"], [f"h.attn.{p}_proj" for p in "qkv"]
    assert torch.equal(
        qkv.weight, RTNQuantizedTensor.from_float(torch.cat([tensors[f"{p}.weight"] for p in parts]), 4, 32)
    )
    assert torch.equal(qkv.bias, torch.cat([tensors[f"{p}.bias"] for p in parts]))
    gate_up = torch.cat([tensors["h.mlp.gate_proj.weight"], tensors["h.mlp.up_proj.weight"]])
    assert torch.equal(model.mlp["gate_up_proj"].weight, RTNQuantizedTensor.from_float(gate_up, 4, 32))
    with pytest.raises(
        ValueError,
        match="out_proj.bias is renamed to bias, and so is h.attn.k_proj.bias; mend the rename map",
    ):
        load(tmp_path, rtn_int4(32), Fused, rename={r"^.*\.": ""})
    del tensors["h.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError,
        match="mlp.gate_proj.weight is to be fused with mlp.up_proj.weight, which the checkpoint lacks",
    ):
        load(tmp_path, rtn_int4(32), Fused, rename={r"^h\.": "", "attn": "attention"}, fuse=fuse)


def test_in_chunks(tmp_path, monkeypatch):
    """Rows of a matrix, and of each expert's, a few at a time; every row once."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.randn(3, 65, 100))
            self.embedding = nn.Embedding(70, 100)
            self.temperature = nn.Parameter(torch.tensor(2.0))

    expected = Experts()
    save_file(expected.state_dict(), tmp_path / "model.safetensors")
    torch.save(expected.state_dict(), tmp_path / "model.pt")
    config = FqnToConfig({"down_proj": rtn_int4(32), "embedding": rtn_int8(32)})
    quantize_(expected, config)
    for chunk in (1, 3000, 1 << 20):
        monkeypatch.setattr("rtn_tensor.checkpoint.fill.CHUNK", chunk)
        monkeypatch.setattr("rtn_tensor.checkpoint.fill.SMALL_CHUNK", chunk)
        assert_same(load(tmp_path / "model.safetensors", config, Experts), expected)
        assert_same(load(tmp_path / "model.pt", config, Experts), expected)


class MetaBytes(TorchDispatchMode):
    """Counts what tensors on meta would take, were it a device: now, and at the highest."""

    def __init__(self, before):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {t.untyped_storage()._cdata: 0 for t in before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.is_meta and not isinstance(t, RTNQuantizedTensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.freed, storage._cdata)
        return out

    def freed(self, key):
        self.now -= self.seen.pop(key)


def test_a_convolution_is_read_in_one_piece(tmp_path, monkeypatch):
    """And not a pair of channels at a time: one of 1024 by 1024 took minutes."""
    model = nn.Sequential(nn.Conv2d(48, 40, 3), nn.Conv2d(40, 64, 1), nn.Linear(64, 32))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    pieces = []
    copied = fill._copy
    monkeypatch.setattr(
        fill, "_copy", lambda piece, *rest: (pieces.append(piece.target), copied(piece, *rest))
    )
    loaded = load(
        tmp_path,
        rtn_int4(32),
        lambda: nn.Sequential(nn.Conv2d(48, 40, 3), nn.Conv2d(40, 64, 1), nn.Linear(64, 32)),
    )
    assert sorted(pieces) == sorted(model.state_dict())
    quantize_(model, rtn_int4(32))
    for fqn, w in model.named_parameters():
        assert torch.equal(loaded.get_parameter(fqn), w), fqn


def test_what_another_device_holds_meanwhile(tmp_path, monkeypatch):
    """Beside the model two chunks of 2 MiB at most, of tensors of 32: what a GPU would hold, as far as can be
    told without one."""
    save_file(
        {"0.weight": torch.zeros(16384, 1024).bfloat16(), "1.weight": torch.zeros(8192, 2048).bfloat16()},
        tmp_path / "m.safetensors",
    )
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(16384, 1024), nn.Linear(2048, 8192, bias=False)).bfloat16()
    watched = []

    def stream(pieces, destinations, meter):
        placed = [t for ts in destinations.values() for t in ts]
        planes = [
            plane
            for t in placed
            for plane in ((t.qdata, t.scale) if isinstance(t, RTNQuantizedTensor) else (t,))
        ]
        with MetaBytes(planes) as counted:
            fill.stream(pieces, destinations, meter)
        watched.append(counted)

    monkeypatch.setattr("rtn_tensor.checkpoint.load.stream", stream)
    monkeypatch.setattr(fill, "is_finite", lambda t: True)  # meta holds no values to look at
    assert isinstance(
        load(tmp_path / "m.safetensors", rtn_int4(), model, device="meta")[1].weight, RTNQuantizedTensor
    )
    (counted,) = watched
    assert 2 << 20 <= counted.peak <= 4 << 20
    assert counted.now == 0


def test_a_shared_weight_that_is_quantized_at_one_place(tmp_path):
    def make():
        model = nn.ModuleDict({"embedding": nn.Embedding(40, 64), "head": nn.Linear(64, 40, bias=False)})
        model["head"].weight = model["embedding"].weight
        return model

    model = make()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt", rtn_int4(32), make)
    quantize_(model, rtn_int4(32))
    assert_same(loaded, model)
    assert str(report(loaded)) == str(report(model))


def test_quantized_files_of_any_module(tmp_path):
    model, config = make_mlp(), FqnToConfig({"1": rtn_int4(32, "signed"), "0": rtn_int8(-1)})
    quantize_(model, config)
    save(model, tmp_path / "folder")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    save(model, tmp_path / "shards", max_shard_size=5000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for name in ("folder", "model.pt", "shards"):
        assert_same(load(tmp_path / name, model=on_meta()), model)
        assert_same(load(tmp_path / name, model=make_mlp), model)
        quantized = on_meta()
        quantize_(quantized, config)
        assert_same(load(tmp_path / name, model=quantized), model)
    alone = nn.Linear(64, 8, bias=False)
    quantize_(alone, rtn_int4(32))
    save(alone, tmp_path / "alone")
    assert_same(load(tmp_path / "alone", model=lambda: nn.Linear(64, 8, bias=False)), alone)


def test_transposed_weights_come_back_transposed(tmp_path):
    model = nn.Module()
    model.w = nn.Parameter(
        RTNQuantizedTensor.from_float(torch.randn(2, 40, 64), 4, 32).mT, requires_grad=False
    )
    save(model, tmp_path / "model")
    empty = nn.Module()
    empty.w = nn.Parameter(torch.empty(2, 64, 40, device="meta"))
    assert torch.equal(load(tmp_path / "model", model=empty).w, model.w)
