"""GGUF files, made here by gguf's own writer and quantizer."""

import json
import re

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from tiny_llama import TEXT, tiny_llama, tiny_tokenizer
from tiny_moe import tiny_moe

from rtn_tensor import RTNQuantizedTensor, export, load, quantize_, rtn_int4, rtn_int8, save
from rtn_tensor.integrations.transformers.files import tensors_in_files

KINDS = gguf.GGMLQuantizationType
KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "head_count": "num_attention_heads",
    "head_count_kv": "num_key_value_heads",
}


def permuted(t, heads):
    """As convert_hf_to_gguf.py has it."""
    return t.reshape(heads, 2, t.shape[0] // heads // 2, *t.shape[1:]).swapaxes(1, 2).reshape(t.shape)


def write(file, model, kind, architecture="llama", change=lambda name, t: t, tokenizer=None):
    """`model` as a GGUF file with weights of a `kind`; gives what they stand for, by the model's names."""
    about = model.config
    names = gguf.get_tensor_name_map(
        {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture], about.num_hidden_layers
    )
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_block_count(about.num_hidden_layers)
    for key, name in KEYS.items():
        getattr(writer, f"add_{key}")(getattr(about, name))
    writer.add_layer_norm_rms_eps(about.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(about.vocab_size)
    if architecture.endswith("moe"):
        writer.add_expert_count(about.num_experts)
        writer.add_expert_used_count(about.num_experts_per_tok)
        writer.add_expert_feed_forward_length(about.moe_intermediate_size)
        writer.add_key_length(about.head_dim)
        writer.add_value_length(about.head_dim)
    writer.add_tokenizer_model("gpt2")
    tokens = [f"<{i}>" for i in range(about.vocab_size)]
    if tokenizer is not None:
        tokens[: len(tokenizer)] = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_bos_token_id(tokenizer.bos_token_id)
        writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_token_list(tokens)
    stacked, stands_for = {}, {}
    for name, t in tensors_in_files(model)[0].items():
        if part := re.match(r"(.*\.experts)\.(\d+)\.(.*)$", name):
            stacked.setdefault(f"{part[1]}.{part[3]}", []).append(t)
        else:
            stacked[name] = t
    for name, t in stacked.items():
        t = torch.stack(t) if isinstance(t, list) else t
        t = t.detach().float().numpy()
        heads = {"q_proj": about.num_attention_heads, "k_proj": about.num_key_value_heads}
        module = name.split(".")[-2]
        order = permuted(np.arange(t.shape[0]), heads[module]) if module in heads else np.arange(t.shape[0])
        if architecture != "llama":
            order = np.arange(t.shape[0])
        new = names.get_name(name, (".weight", ".bias"))
        if t.ndim == 1 or "_proj." not in name:
            writer.add_tensor(new, np.ascontiguousarray(t, dtype=np.float32))
            continue
        data = quantize(change(new, t[order]), kind)
        writer.add_tensor(new, data, raw_dtype=kind)
        back = dequantize(data, kind)
        stands_for[name] = torch.from_numpy(back if len(back) != len(order) else back[np.argsort(order)])
    writer.add_tensor("rope_freqs.weight", np.ones(12, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stands_for


def wide_llama():
    """Rows that are whole blocks of 256, for the K-quants; else as `tiny_llama`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(("kind", "bits"), [(KINDS.Q4_0, 4), (KINDS.Q8_0, 8)])
def test_bit_for_bit(tmp_path, kind, bits):
    stands_for = write(tmp_path / "a.gguf", tiny_llama(), kind)
    loaded = load(tmp_path / "a.gguf")
    assert len(stands_for) == 14
    assert loaded.dtype == torch.bfloat16
    for name, w in stands_for.items():
        got = loaded.get_parameter(name)
        assert (got.bits, got.group_size, got.scale_method, got.scale.dtype) == (
            bits,
            32,
            "given",
            torch.float16,
        )
        assert torch.equal(got.dequantize(torch.float32), w), name
    save(loaded, tmp_path / "ours")
    again = load(tmp_path / "ours")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, again(ids).logits)


@pytest.mark.parametrize("kind", [KINDS.Q4_0, KINDS.Q8_0, KINDS.Q5_0, KINDS.Q4_1, KINDS.F16, KINDS.BF16])
def test_as_transformers_dequantizes(tmp_path, kind):
    from transformers import AutoModelForCausalLM, GgufConfig

    write(tmp_path / "a.gguf", tiny_llama(), kind)
    if kind in (KINDS.F16, KINDS.BF16, KINDS.Q4_0, KINDS.Q8_0):
        loaded = load(tmp_path / "a.gguf", dtype=torch.float32)
    else:
        with pytest.warns(
            UserWarning, match="quantized by GGUF; they are dequantized as they are read, and stay"
        ):
            loaded = load(tmp_path / "a.gguf", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="a.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    for (name, a), b in zip(loaded.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.dequantize() if isinstance(a, RTNQuantizedTensor) else a, b), name
    assert theirs.config.to_dict() == {
        key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"
    }


def test_k_quants_are_quantized_anew(tmp_path):
    """gguf quantizes to none of them, but reads any bytes as blocks."""
    model = wide_llama()
    for kind in (KINDS.Q4_K, KINDS.Q6_K):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rng = np.random.default_rng(0)

        def make(t, kind, block=block, size=size, rng=rng):
            data = rng.integers(0, 256, (*t.shape[:-1], t.shape[-1] // block, size), dtype=np.uint8)
            # The scales of all, where they lie.
            half = np.full((*data.shape[:-1], 1), 1e-3, np.float16).view(np.uint8)
            at = (0, 2) if kind == KINDS.Q4_K else (size - 2,)
            for start in at:
                data[..., start : start + 2] = half
            return data.reshape(*t.shape[:-1], -1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "quantize", make)
            stands_for = write(tmp_path / "a.gguf", model, kind)
        with pytest.warns(UserWarning, match="quantized anew"):
            loaded = load(tmp_path / "a.gguf", rtn_int8(64))
        for name, w in stands_for.items():
            due = RTNQuantizedTensor.from_float(w.bfloat16(), 8, 64)
            got = loaded.get_parameter(name)
            assert torch.equal(got.qdata, due.qdata), name
            assert torch.equal(got.scale, due.scale), name


def test_experts(tmp_path):
    model = tiny_moe("Qwen3Moe")
    stands_for = write(tmp_path / "a.gguf", model, KINDS.Q8_0, "qwen3moe")
    # transformers reads another size of experts than the file has, where that is not Qwen's own.
    loaded = load(tmp_path / "a.gguf", model=lambda: type(model)(model.config).half())
    experts = loaded.model.layers[1].mlp.experts
    gate, up, down = (
        stands_for[f"model.layers.1.mlp.experts.{n}_proj.weight"] for n in ("gate", "up", "down")
    )
    assert experts.gate_up_proj.bits == 8
    assert torch.equal(experts.gate_up_proj.dequantize(torch.float32), torch.cat([gate, up], 1))
    assert torch.equal(experts.down_proj.dequantize(torch.float32), down)


@pytest.mark.parametrize("config", [rtn_int4(32, "signed"), rtn_int8(32)])
def test_exported_and_loaded(tmp_path, config):
    model = tiny_llama(dtype=torch.float16)
    write(like := tmp_path / "like.gguf", model, KINDS.BF16)
    quantize_(model, [("model.*", config)])
    export(model, tmp_path / "out.gguf", "gguf", like=like)
    loaded = load(tmp_path / "out.gguf", dtype=torch.float16)
    for name, w in model.named_parameters():
        if isinstance(w, RTNQuantizedTensor):
            assert torch.equal(loaded.get_parameter(name).qdata, w.qdata)
            assert torch.equal(loaded.get_parameter(name).scale, w.scale)


def test_of_a_model_that_is_not_transformers(tmp_path):
    write(tmp_path / "a.gguf", tiny_llama(layers=1), KINDS.Q8_0)
    with pytest.raises(ValueError, match="a.gguf: a GGUF file fills models of transformers only"):
        load(tmp_path / "a.gguf", model=torch.nn.Linear(2, 2))


def test_a_file_that_is_cut_off(tmp_path):
    write(tmp_path / "a.gguf", tiny_llama(layers=1), KINDS.Q8_0)
    data = (tmp_path / "a.gguf").read_bytes()
    for length in (10, 1000, len(data) // 2, len(data) - 100):
        (tmp_path / "b.gguf").write_bytes(data[:length])
        with pytest.raises(ValueError, match="b.gguf is truncated or corrupt"):
            load(tmp_path / "b.gguf")


def test_tensors_that_are_missing_or_of_another_shape(tmp_path):
    model = tiny_llama(layers=1)
    write(tmp_path / "a.gguf", model, KINDS.Q8_0, change=lambda name, t: t[:64] if "ffn_up" in name else t)
    with pytest.raises(ValueError, match=r"a.gguf: model.layers.0.mlp.up_proj.weight has shape \[64, 96\]"):
        load(tmp_path / "a.gguf")


def test_the_commands(tmp_path, run):
    """A file holds its tokenizer; a folder is not made of it by the command line."""
    file, text = tmp_path / "a.gguf", tmp_path / "text.txt"
    tokenizer = tiny_tokenizer()
    write(file, tiny_llama(), KINDS.Q8_0, tokenizer=tokenizer)
    text.write_text(TEXT)
    save(load(file), tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    found = [run("perplexity", place, "--text", text)[:2] for place in (file, tmp_path / "ours")]
    assert found[0] == found[1]
    assert found[0][0] == 0
    status, _, err = run("quantize", file, tmp_path / "b")
    assert status == 1
    assert "it is a GGUF file; load() reads it, and save() or export() writes" in err
