"""`export`: what every format has in common, and compressed-tensors, against its own library and transformers."""

import errno
import json
import math
import re
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from file_tree import tree
from safetensors import safe_open
from tiny_llama import tiny_llama, tiny_tokenizer
from tiny_moe import tiny_moe
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from rtn_tensor import (
    RTNQuantizedTensor,
    dequantize_,
    export,
    load,
    quantize_,
    rtn,
    rtn_int4,
    rtn_int8,
    save,
)
from rtn_tensor.formats import FORMATS, pack_gptq

IDS = torch.tensor([[5, 77, 30, 9, 101, 64]])


def but_the_ends(module, fqn):
    return isinstance(module, nn.Linear) and fqn != "lm_head"


def llama(config=None, filter_fn=but_the_ends, **kwargs):
    model = tiny_llama(dtype=torch.bfloat16, **kwargs)
    quantize_(model, config if config is not None else rtn_int4(32), filter_fn)
    return model


def read(folder):
    """The tensors of a folder, and its quantization config."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: opened.get_tensor(name) for name in opened.keys()}
    return found, json.loads((folder / "config.json").read_text())["quantization_config"]


def from_transformers(folder, monkeypatch, **kwargs):
    """The model that transformers makes of a folder with compressed-tensors, dequantized."""
    pytest.importorskip("compressed_tensors")
    from loguru import logger

    logger.remove()
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
    with torch.no_grad():
        model(IDS)  # at which it dequantizes
    return model


def assert_same(got, model):
    """The weights of `got` are bitwise those of `model`, dequantized."""
    dequantize_(model)
    expected = dict(model.named_parameters(remove_duplicate=False))
    found = dict(got.named_parameters(remove_duplicate=False))
    for name, w in expected.items():
        assert torch.equal(found[name], w), name
    with torch.no_grad():
        torch.testing.assert_close(got(IDS).logits, model(IDS).logits, rtol=0, atol=1e-2)


# ------------------------------------------------------------------------ compressed-tensors


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("k", [1, 31, 64, 100, 1000])
def test_words_are_those_of_its_packer(bits, k):
    packer = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    fmt = FORMATS[bits]
    q = torch.randint(fmt.qmin, fmt.qmax + 1, (5, k), dtype=torch.int8)
    q[0], q[1] = fmt.qmin, fmt.qmax
    assert torch.equal(pack_gptq(q, bits), packer.pack_to_int32(q, bits))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        rtn_int4(32, "signed"),
        rtn_int4(64),
        rtn_int4(128),
        rtn_int4(-1, "absmax"),
        rtn_int8(-1),
        rtn_int8(96),
        [("*.down_proj", rtn_int8(128)), ("*layers.1.*o_proj", None), ("*", rtn_int4(32))],
    ],
    ids=str,
)
def test_transformers_reads_the_same_weights(tmp_path, config, tied, monkeypatch):
    model = llama(config, tied=tied)
    report = export(model, tmp_path / "a")
    assert report.format == "compressed-tensors"
    got = from_transformers(tmp_path / "a", monkeypatch)
    assert (got.lm_head.weight is got.model.embed_tokens.weight) == tied
    assert_same(got, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scales_keep_their_dtype(tmp_path, dtype, monkeypatch):
    model = tiny_llama(dtype=dtype)
    quantize_(model, rtn_int4(32), but_the_ends)
    report = export(model, tmp_path / "a")
    assert ("float32 scales" in report.engines[0]) == (dtype == torch.float32)
    scales = [t for name, t in read(tmp_path / "a")[0].items() if name.endswith("weight_scale")]
    assert {t.dtype for t in scales} == {dtype}
    assert_same(from_transformers(tmp_path / "a", monkeypatch), model)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe", "Qwen3Moe", "DeepseekV3", "Olmoe"])
@pytest.mark.parametrize("mixed", [False, True])
def test_experts_are_one_module_each(tmp_path, name, mixed, monkeypatch):
    model = tiny_moe(name, torch.bfloat16)
    rest = rtn_int4(32)
    quantize_(model, [("*.experts.*", rtn_int8(-1)), ("*", rest)] if mixed else rest)
    report = export(model, tmp_path / "a")
    found, config = read(tmp_path / "a")
    experts = [name for name in found if ".experts.0." in name and name.endswith("weight_packed")]
    assert experts
    assert all(found[name].dim() == 2 for name in experts)
    if mixed:
        targets = {
            group["weights"]["num_bits"]: group["targets"] for group in config["config_groups"].values()
        }
        assert targets[8] == [r"re:.*\.experts\.\d+\..*"]
        assert "re:" not in "".join(targets[4])
    assert all(" reads it" in engine for engine in report.engines)
    assert_same(from_transformers(tmp_path / "a", monkeypatch), model)


def test_an_output_layer_of_its_own(tmp_path, monkeypatch):
    """quantize_ unties it from the embedding, which stays float."""
    model = llama(filter_fn=lambda module, fqn: isinstance(module, nn.Linear), tied=True)
    export(model, tmp_path / "a")
    found, config = read(tmp_path / "a")
    assert config["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert {"lm_head.weight_packed", "model.embed_tokens.weight"} <= set(found)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["tie_word_embeddings"] is False
    assert model.config.tie_word_embeddings is True
    assert_same(from_transformers(tmp_path / "a", monkeypatch), model)


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_embedding_is_written_float(tmp_path, tied, monkeypatch):
    def all_of_it(module, fqn):
        return isinstance(module, nn.Linear | nn.Embedding)

    model = llama(filter_fn=all_of_it, tied=tied)
    report = export(model, tmp_path / "a")
    found, config = read(tmp_path / "a")
    assert found["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert ("lm_head.weight_packed" in found) == (not tied)
    assert config["ignore"] == (["lm_head"] if tied else [])
    assert report.changes[-1] == "Written float, as engines keep embeddings float: model.embed_tokens.weight."
    row = next(row for row in report.rows if row.name == "model.embed_tokens.weight")
    assert (row.bits, row.bytes_after) == (None, 320 * 96 * 2)
    assert_same(from_transformers(tmp_path / "a", monkeypatch), model)


def test_few_rows_are_written_float(tmp_path, monkeypatch):
    model = tiny_moe("Qwen2Moe", torch.bfloat16)
    quantize_(model, rtn_int8(32))
    assert isinstance(model.model.layers[0].mlp.shared_expert_gate.weight, RTNQuantizedTensor)
    report = export(model, tmp_path / "a")
    assert report.changes == [
        "Written float, as engines have no kernel for 1 rows (but for multiples of 4 from 32 on): "
        "model.layers.0.mlp.shared_expert_gate.weight, model.layers.1.mlp.shared_expert_gate.weight."
    ]
    found, config = read(tmp_path / "a")
    assert found["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, 64)
    assert "model.layers.0.mlp.shared_expert_gate" in config["ignore"]
    assert_same(from_transformers(tmp_path / "a", monkeypatch), model)


def test_groups_are_cut_where_they_must_be(tmp_path):
    """K = 96 and 160: of groups of 64, 32 fit both."""
    model = llama(rtn_int4(64))
    w = model.model.layers[0].self_attn.q_proj.weight
    assert w.scale.shape == (96, 2)
    report = export(model, tmp_path / "a")
    found, config = read(tmp_path / "a")
    assert [group["weights"]["group_size"] for group in config["config_groups"].values()] == [32]
    scale = found["model.layers.0.self_attn.q_proj.weight_scale"]
    assert torch.equal(scale, w.scale[:, [0, 0, 1]])
    assert report.changes == [
        "Groups of 64 are written as groups of 32, the scale of each several times (14 weights)."
    ]
    row = next(row for row in report.rows if row.name.endswith("0.self_attn.q_proj.weight"))
    size = sum(t.nbytes for name, t in found.items() if name.startswith("model.layers.0.self_attn.q_proj."))
    assert (row.bits, row.group_size, row.bytes_after) == (4, 32, size)


@pytest.mark.parametrize(
    ("hidden", "group_size", "works"), [(1000, 32, False), (1000, 1024, True), (1000, -1, True)]
)
def test_groups_that_no_engine_has(tmp_path, hidden, group_size, works, monkeypatch):
    config = LlamaConfig(
        vocab_size=320, hidden_size=hidden, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    quantize_(model, rtn_int4(group_size), but_the_ends)
    if works:
        export(model, tmp_path / "a")
        assert_same(from_transformers(tmp_path / "a", monkeypatch), model)
        return
    with pytest.raises(
        ValueError, match="gate_proj: K = 1000 and group_size 32 share only 8, and no engine"
    ) as caught:
        export(model, tmp_path / "a")
    assert "group_size -1" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["GptOss", "Llama4"])
def test_transposed_experts_are_refused(tmp_path, name):
    model = tiny_moe(name, torch.bfloat16)
    quantize_(model, rtn_int4(32))
    with pytest.raises(ValueError, match=r"layers.0.*experts.*stored as \[in_features, out_features\]"):
        export(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_parts_that_engines_fuse(tmp_path):
    mixed = [("*.q_proj", rtn_int8(32)), ("*", rtn_int4(32))]
    report = export(llama(mixed), tmp_path / "a")
    assert_expected_inline(
        "\n".join(report.engines).replace("compressed-tensors", "c-t"),
        """\
vLLM 0.32 does not read it: it holds model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj as one, and they have several formats.
SGLang 0.5.23 does not read it: it holds model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj as one, and they have several formats.
transformers 5.23 with c-t 0.20 reads it: it dequantizes at the first forward, so that no memory is saved; with dequantize=True it does not, as there are several formats.""",
    )
    report = export(llama([("*.0.*.k_proj", None), ("*", rtn_int4(32))]), tmp_path / "b")
    assert "does not read" in report.engines[0]


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(
    "config", [rtn(4, 64, "minmax"), rtn(4, -1, "minmax"), rtn(8, 32, "minmax")], ids=str
)
def test_zero_points(tmp_path, config):
    """By compressed-tensors' own code, and by transformers, which makes room for them in one way only."""
    compressors = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    from compressed_tensors.quantization import QuantizationScheme
    from loguru import logger
    from transformers import CompressedTensorsConfig

    logger.remove()
    model = llama(config)
    report = export(model, tmp_path / "a")
    found, about = read(tmp_path / "a")
    scheme = QuantizationScheme(**about["config_groups"]["group_0"])
    for name, w in model.named_parameters():
        if isinstance(w, RTNQuantizedTensor):
            planes = {key.rpartition(".")[2]: t for key, t in found.items() if key.startswith(f"{name}_")}
            assert set(planes) == {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point"}
            got = compressors.PackedQuantizationCompressor.decompress(planes, scheme)["weight"]
            assert torch.equal(got, w.dequantize())
    assert "reads it: with CompressedTensorsConfig(dequantize=True)" in report.engines[2]
    whole = CompressedTensorsConfig(dequantize=True)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "a", quantization_config=whole).eval(), model)


def test_zero_points_come_back(tmp_path):
    model = llama(rtn(4, 32, "minmax"))
    export(model, tmp_path / "a")
    again = load(tmp_path / "a")
    for name, w in model.named_parameters():
        if isinstance(w, RTNQuantizedTensor):
            assert torch.equal(again.get_parameter(name).zero, w.zero)
            assert torch.equal(again.get_parameter(name).dequantize(), w.dequantize())
    export(again, tmp_path / "b")
    one, two = (tmp_path / name / "model.safetensors" for name in ("a", "b"))
    assert one.read_bytes() == two.read_bytes()


def test_scales_of_another_dtype_than_the_model(tmp_path):
    """As those of GPTQ checkpoints in a bfloat16 model: they are written as they are."""
    model = tiny_llama(dtype=torch.float16)
    quantize_(model, rtn_int4(32), but_the_ends)
    export(model, tmp_path / "a", "gptq")
    for name in ("compressed-tensors", "gptq"):
        report = export(load(tmp_path / "a", dtype=torch.bfloat16), tmp_path / name, name)
        assert ("rounds the float16 scales" in report.engines[0]) == (name == "compressed-tensors")
        found, about = read(tmp_path / name)
        scales = [t for key, t in found.items() if key.endswith(("weight_scale", "scales"))]
        assert {t.dtype for t in scales} == {torch.float16}
        assert found["model.embed_tokens.weight"].dtype == torch.bfloat16
    again, _ = read(tmp_path / "gptq")
    first, _ = read(tmp_path / "a")
    assert all(
        torch.equal(again[key], t) for key, t in first.items() if t.dtype == torch.int32 or "scales" in key
    )


def test_zero_points_beyond_the_bits(tmp_path):
    """As GPTQ's may be."""
    model = llama(rtn(4, 32, "minmax"))
    model.model.layers[1].mlp.up_proj.weight.zero[3, 1] = 8
    why = (
        r"layers.1.mlp.up_proj: a zero point is 8 or -?\d, and 4 bits hold -8 to 7; load the checkpoint with"
    )
    with pytest.raises(ValueError, match=why):
        export(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------- of every format


def test_what_cannot_be_exported(tmp_path):
    quantized = llama()
    cases = [
        (
            quantized,
            {"format": "awq"},
            ValueError,
            "format='awq' is not known; use one of 'compressed-tensors'",
        ),
        (quantized, {"like": "a.gguf"}, ValueError, "like='a.gguf' is for format='gguf'"),
        (tiny_llama(), {}, ValueError, "no weight of LlamaForCausalLM is there to be written quantized"),
        (nn.Linear(4, 4), {}, TypeError, "model is a Linear, and engines read models of transformers only"),
        ("a model", {}, TypeError, "model"),
    ]
    for model, arguments, kind, why in cases:
        with pytest.raises(kind) as caught:
            export(model, tmp_path / "a", **arguments)
        assert why in str(caught.value)
    with pytest.raises(ValueError, match="named as a file is"):
        export(quantized, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_plane_that_is_not_written(tmp_path):
    model = llama(rtn(4, 32, "minmax"))
    with pytest.raises(
        ValueError, match=r"model.layers.0.self_attn.q_proj.weight has a plane 'zero', which gptq"
    ):
        export(model, tmp_path / "a", "gptq")
    assert list(tmp_path.iterdir()) == []


def test_the_model_stays_as_it_was(tmp_path):
    for model in (llama(), load_of_ours(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path / "ours")):
        before, attributes = model.config.to_dict(), dict(vars(model))
        state = dict(model.named_parameters())
        export(model, tmp_path / "a", force=True)
        assert model.config.to_dict() == before
        assert vars(model) == attributes
        assert all(t is state[name] for name, t in model.named_parameters())


def load_of_ours(tmp_path):
    save(llama(tied=True), tmp_path / "ours")
    return load(tmp_path / "ours")


@pytest.mark.parametrize("name", ["Mixtral", "DeepseekV3"])
def test_a_folder_read_by_us_or_by_transformers_gives_the_same_files(tmp_path, name):
    model = tiny_moe(name, torch.bfloat16)
    quantize_(model, rtn_int4(32))
    save(model, tmp_path / "ours")
    export(model, tmp_path / "a")
    export(load(tmp_path / "ours"), tmp_path / "b")
    export(AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), tmp_path / "c")
    expected, config = read(tmp_path / "a")
    for other in ("b", "c"):
        found, about = read(tmp_path / other)
        assert about == config
        assert sorted(found) == sorted(expected)
        assert all(torch.equal(found[name], t) for name, t in expected.items())


@pytest.fixture
def source(tmp_path):
    """A float model's folder with its tokenizer, card and more."""
    folder = tmp_path / "models--some-org--Some-Model" / "snapshots" / "0123"
    tiny_llama(tied=True, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: some-org/base\n---\n# Some model\n")
    (folder / "LICENSE").write_text("free")
    (folder / "optimizer.pt").write_text("")
    return folder


def test_what_goes_along(source, tmp_path):
    model = load(source, rtn_int4(32))
    report = export(model, tmp_path / "out")
    assert [file.name for file in sorted((tmp_path / "out").iterdir())] == [
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}"
    text = (tmp_path / "out" / "README.md").read_text()
    assert_expected_inline(
        text.replace("compressed-tensors", "c-t"),
        """\
---
base_model: some-org/Some-Model
library_name: transformers
license: mit
tags:
- quantized
- c-t
base_model_relation: quantized
quantized_by: rtn-tensor
quantization:
  format: c-t
  weights:
  - 4 bits, group_size 32, scale_method 'search' (14 matrices)
  bits_per_weight: 6.518
---

# out

The weights of [some-org/Some-Model](https://huggingface.co/some-org/Some-Model), quantized:

- 4 bits, group_size 32, scale_method 'search' (14 matrices)

All parameters together take 6.52 bits per weight.

## How to run it

PATH is this folder.

### vLLM 0.32

```sh
vllm serve PATH
```

### SGLang 0.5.23

Note: by its source, not tried.

```sh
python -m sglang.launch_server --model-path PATH
```

### transformers 5.23 with c-t 0.20

Note: it dequantizes at the first forward, so that no memory is saved.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
written = model.generate(**tokenizer("Why is the sky blue?", return_tensors="pt"), max_new_tokens=32)
print(tokenizer.decode(written[0]))
```

## How it was made

By rtn-tensor 0.1.0, in the format c-t: each weight is an integer of few bits times
the scale of its group. The integers and scales are those of the model that was exported.
""",
    )
    assert f"{report.bits_per_weight:.2f}" in text


def test_the_card_of_a_quantized_model(source, tmp_path):
    """Its licence, and the model that it was made of, go on."""
    from huggingface_hub import metadata_load

    export(load(source, rtn_int4(32)), tmp_path / "first")
    card = tmp_path / "first" / "README.md"
    save(load(source, rtn_int4(32)), tmp_path / "ours")
    (tmp_path / "ours" / "README.md").write_text(card.read_text())
    export(load(tmp_path / "ours"), tmp_path / "second")
    for folder in ("first", "second"):
        about = metadata_load(tmp_path / folder / "README.md")
        assert (about["license"], about["base_model"]) == ("mit", "some-org/Some-Model")
        assert about["base_model_relation"] == "quantized"
    (tmp_path / "ours" / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match=r"README.md: its header cannot be read .*; mend or remove the file"):
        export(load(tmp_path / "ours"), tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_the_card_of_a_model_that_writes_no_text(tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=64, **sizes)).bfloat16().eval()
    quantize_(model, rtn_int8(32))
    export(model, tmp_path / "a")
    text = (tmp_path / "a" / "README.md").read_text()
    assert 'model = BertModel.from_pretrained("PATH")' in text
    assert "CausalLM" not in text


def test_an_existing_destination(source, tmp_path):
    model = load(source, rtn_int4(32))
    export(model, tmp_path / "a")
    before = tree(tmp_path / "a")
    with pytest.raises(
        FileExistsError, match="exists; choose another name, or pass force=True to replace it"
    ):
        export(model, tmp_path / "a")
    with pytest.raises(ValueError, match="the model that is read"):
        export(model, source, force=True)
    assert tree(tmp_path / "a") == before
    export(load(source, rtn_int8(32)), tmp_path / "a", force=True)
    assert tree(tmp_path / "a") != before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("precious")
    with pytest.raises(FileExistsError, match="only a model's folder is replaced"):
        export(model, tmp_path / "thesis", force=True)


@pytest.mark.parametrize("what", ["model.safetensors", "README.md"])
def test_a_full_disk(tmp_path, what, monkeypatch):
    model = llama()
    opened = Path.write_text if what == "README.md" else open

    def full(file, *args, **kwargs):
        if Path(file).name == what:
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(file, *args, **kwargs)

    if what == "README.md":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        monkeypatch.setattr("rtn_tensor.checkpoint.shards.open", full, raising=False)
    with pytest.raises(OSError, match="No space left on device") as caught:
        export(model, tmp_path / "a")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    assert list(tmp_path.iterdir()) == []


def test_shards(tmp_path, monkeypatch):
    model = llama()
    export(model, tmp_path / "one")
    monkeypatch.setattr("rtn_tensor.checkpoint.export.SHARD_BYTES", 50_000)
    export(model, tmp_path / "many")
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((tmp_path / "many" / file).stat().st_size < 62_000 or "00001" in file for file in files)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = read(tmp_path / "one")[0], read(tmp_path / "many")[0]
    assert sorted(index["weight_map"]) == sorted(one) == sorted(many)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    assert all(torch.equal(many[name], t) for name, t in one.items())


def test_only_one_weight_is_in_memory(tmp_path, monkeypatch):
    """What is made for the file is gone before the next is made."""
    import weakref

    from rtn_tensor.checkpoint.foreign import compressed_tensors

    alive = []

    def pack(q, bits):
        assert not [made for made in alive if made() is not None]
        packed = pack_gptq(q, bits)
        alive.append(weakref.ref(packed))
        return packed

    monkeypatch.setattr(compressed_tensors, "pack_gptq", pack)
    export(llama(), tmp_path / "a")
    assert len(alive) == 14


def test_scales_of_any_kind(tmp_path):
    """Negative ones, and the least integer, which has no opposite."""
    for method in ("absmax", "signed", "search"):
        model = llama(rtn(4, 32, method))
        export(model, tmp_path / method)
        found, _ = read(tmp_path / method)
        w = model.model.layers[0].mlp.up_proj.weight
        words = found["model.layers.0.mlp.up_proj.weight_packed"]
        u = torch.stack([words >> shift & 15 for shift in range(0, 32, 4)], -1).flatten(-2)
        scale = found["model.layers.0.mlp.up_proj.weight_scale"]
        assert torch.equal((u - 8) * scale.float().repeat_interleave(32, -1), w.dequantize(torch.float32))
        assert math.prod(found["model.layers.0.mlp.up_proj.weight_shape"]) == w.numel()


# ------------------------------------------------------------------------------------- gptq


def gptq_weight(found, module, bits, group_size):
    """w = S (u - zero) of one module, in fp32, read from the definition."""
    words, scale, zeros, index = (
        found[f"{module}.{end}"] for end in ("qweight", "scales", "qzeros", "g_idx")
    )
    shifts = torch.arange(0, 32, bits)
    mask = 2**bits - 1
    u = (words[:, None] >> shifts[:, None] & mask).flatten(0, 1)  # [K, N]
    zero = (zeros[..., None] >> shifts & mask).flatten(-2) + 1  # [G, N]
    assert torch.equal(index, (torch.arange(len(u)) // (len(u) if group_size == -1 else group_size)).int())
    return ((u - zero[index]) * scale.float()[index]).t()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config", [rtn_int4(32, "signed"), rtn_int4(64), rtn_int4(-1), rtn_int8(-1), rtn_int8(32)], ids=str
)
def test_gptq(tmp_path, config, dtype):
    model = tiny_llama(dtype=dtype, tied=True)
    quantize_(model, config, but_the_ends)
    report = export(model, tmp_path / "a", format="gptq")
    found, about = read(tmp_path / "a")
    group_size = -1 if config.group_size == -1 else 32
    assert about == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": config.bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    }
    assert json.loads((tmp_path / "a" / "quantize_config.json").read_text()) == about
    zeros = {int(word) for name, t in found.items() if name.endswith(".qzeros") for word in t.unique()}
    assert zeros == {{4: 0x77777777, 8: 0x7F7F7F7F}[config.bits]}
    weights = {name: w for name, w in model.named_parameters() if isinstance(w, RTNQuantizedTensor)}
    assert len(weights) == 14
    for name, w in weights.items():
        module = name.removesuffix(".weight")
        got = gptq_weight(found, module, config.bits, group_size)
        assert torch.equal(got, w.dequantize(torch.float32))
        assert found[f"{module}.scales"].dtype == dtype
        assert found[f"{module}.qweight"].is_contiguous()
    assert all(" reads it" in engine for engine in report.engines)


def test_gptq_formats_by_layer(tmp_path):
    rules = [
        ("*.0.*.gate_proj", rtn_int8(32)),
        ("*.0.*.up_proj", rtn_int8(32)),
        ("*.1.*.down_proj", rtn_int4(-1)),
        ("*.1.*.o_proj", None),
        ("lm_head", rtn_int8(32)),
        ("*", rtn_int4(32)),
    ]
    model = llama(rules, lambda module, fqn: isinstance(module, nn.Linear))
    report = export(model, tmp_path / "a", format="gptq")
    _, about = read(tmp_path / "a")
    assert (about["bits"], about["group_size"], about["lm_head"]) == (4, 32, True)
    assert_expected_inline(
        json.dumps(about["dynamic"], indent=1),
        """\
{
 "+:^lm_head$": {
  "bits": 8,
  "group_size": 32
 },
 "+:^model\\\\.layers\\\\.0\\\\.mlp\\\\.gate_proj$": {
  "bits": 8,
  "group_size": 32
 },
 "+:^model\\\\.layers\\\\.0\\\\.mlp\\\\.gate_up_proj$": {
  "bits": 8,
  "group_size": 32
 },
 "+:^model\\\\.layers\\\\.0\\\\.mlp\\\\.up_proj$": {
  "bits": 8,
  "group_size": 32
 },
 "+:^model\\\\.layers\\\\.1\\\\.mlp\\\\.down_proj$": {
  "bits": 4,
  "group_size": -1
 },
 "-:^model\\\\.layers\\\\.1\\\\.self_attn\\\\.o_proj$": {}
}""",
    )
    assert [" reads it" in engine for engine in report.engines] == [True, True, False]
    mixed = llama([("*.q_proj", rtn_int8(32)), ("*", rtn_int4(32))])
    report = export(mixed, tmp_path / "b", format="gptq")
    assert [" reads it" in engine for engine in report.engines] == [False, False, False]


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_gptq_experts(tmp_path, name):
    model = tiny_moe(name, torch.bfloat16)
    quantize_(model, [("*.1.*.experts.*", rtn_int8(-1)), ("*", rtn_int4(32))])
    export(model, tmp_path / "a", format="gptq")
    found, about = read(tmp_path / "a")
    experts = [name for name in found if ".experts.0." in name and name.endswith("qweight")]
    assert len(experts) == 6
    for key in experts:
        module, first = key.removesuffix(".qweight"), ".0." in key.partition(".experts")[0]
        hits = [about["dynamic"][p] for p in about["dynamic"] if re.match(p[2:], module)]
        assert hits == ([] if first else [{"bits": 8, "group_size": -1}])
    layer = experts[-1].partition(".0.")[0]
    assert [how for p, how in about["dynamic"].items() if re.match(p[2:], layer)] == [
        {"bits": 8, "group_size": -1}
    ]
    gate = about["dynamic"].keys() & {rf"-:^{re.escape(layer.removesuffix('.experts') + '.gate')}$"}
    assert gate
    down = model.model.layers[1].mlp.experts.down_proj[3].dequantize(torch.float32)
    last = f"{layer}.3.{'w2' if name == 'Mixtral' else 'down_proj'}"
    assert torch.equal(gptq_weight(found, last, 8, -1), down)


def test_gptq_words_that_are_not_whole(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=320, **sizes), dtype=torch.bfloat16
    ).eval()
    quantize_(model, rtn_int4(-1), but_the_ends)
    why = r"down_proj: K = 100 is no multiple of 8, .*; leave it float, or use compressed-tensors"
    with pytest.raises(ValueError, match=why):
        export(model, tmp_path / "a", format="gptq")
    assert list(tmp_path.iterdir()) == []
    export(model, tmp_path / "b")
