"""What every format of `export` has in common."""

import errno
import json
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from exported import llama, load_of_ours, read
from file_tree import tree
from tiny_llama import tiny_llama, tiny_tokenizer
from tiny_moe import tiny_moe
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, SiglipVisionConfig, SiglipVisionModel

from rtn_tensor import (
    export,
    load,
    quantize_,
    rtn,
    rtn_int4,
    rtn_int8,
    save,
)
from rtn_tensor.formats import pack_gptq


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
        ValueError, match=r"model.layers.0.self_attn.q_proj.weight has a plane 'zero'.* gptq is not written"
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


def test_attention_of_torch_is_written_float(tmp_path):
    """Engines have its weights as no linear's."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    model = SiglipVisionModel(SiglipVisionConfig(**vision)).eval()
    quantize_(model, rtn_int4(32))
    result = export(model, tmp_path / "out", format="compressed-tensors")
    written = {
        row.name: row.note for row in result.rows if "head.attention." in row.name and len(row.shape) > 1
    }
    assert len(written) == 2
    assert set(written.values()) == {"written float"}
    again, image = load(tmp_path / "out"), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            again(image).pooler_output, model(image).pooler_output, rtol=1e-4, atol=1e-4
        )
