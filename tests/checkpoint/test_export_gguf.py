"""`export(format="gguf")`, against gguf's own reading of blocks; files to graft onto are made here."""

import errno

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from tiny_gguf import permuted, write_like
from tiny_llama import tiny_llama
from tiny_moe import tiny_moe
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig

from rtn_tensor import RTNQuantizedTensor, export, load, quantize_, rtn, rtn_int4, rtn_int8, save

KINDS = gguf.GGMLQuantizationType


def but_the_ends(module, fqn):
    return isinstance(module, nn.Linear) and fqn != "lm_head"


def read(file):
    reader = gguf.GGUFReader(file)
    return {t.name: t for t in reader.tensors}, {
        key: field.contents() for key, field in reader.fields.items()
    }


def floats(t):
    return torch.from_numpy(dequantize(np.array(t.data), t.tensor_type))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config",
    [
        rtn_int4(32, "signed"),
        rtn_int4(64),
        rtn_int4(-1),
        rtn_int8(-1, "signed"),
        rtn_int8(32),
        [("*.k_proj", None), ("*.down_proj", rtn_int8(96)), ("*", rtn_int4(32))],
    ],
    ids=str,
)
def test_blocks_are_the_same_numbers(tmp_path, config, dtype):
    model = tiny_llama(dtype=dtype, tied=True)
    like = write_like(tmp_path / "like.gguf", model)
    quantize_(model, config, but_the_ends)
    report = export(model, tmp_path / "a.gguf", "gguf", like=like)
    found, about = read(tmp_path / "a.gguf")
    there, before = read(like)
    assert set(found) == set(there)
    assert about == before | {
        "general.file_type": 7 if config in (rtn_int8(-1, "signed"), rtn_int8(32)) else 2
    }
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    count = 0
    for name, w in model.named_parameters():
        new = names.get_name(name, (".weight",))
        if isinstance(w, RTNQuantizedTensor):
            expected = w.dequantize(torch.float32)
            heads = {"q": 4, "k": 2}.get(name.split(".")[-2][0]) if "self_attn" in name else None
            expected = expected if heads is None else permuted(expected, heads)
            assert found[new].tensor_type == {4: KINDS.Q4_0, 8: KINDS.Q8_0}[w.bits]
            count += 1
        else:
            expected = floats(there[new])
            assert found[new].tensor_type == there[new].tensor_type
        assert torch.equal(floats(found[new]), expected), name
    assert count == (12 if isinstance(config, list) else 14)
    assert "rounded" not in "".join(report.changes)
    row = next(row for row in report.rows if row.name.endswith("0.mlp.up_proj.weight"))
    assert row.bytes_after == found["blk.0.ffn_up.weight"].n_bytes
    assert list(tmp_path.glob(".*")) == []


def test_least_integers_and_the_order_in_a_block(tmp_path):
    """Bytes by the definition, of -8 to 7 and of -128 to 127."""
    for bits in (4, 8):
        model = tiny_llama(dtype=torch.bfloat16, tied=True)
        w = model.model.layers[0].mlp.up_proj.weight
        with torch.no_grad():
            w[0, :32] = torch.linspace(-1, 1 - 2 ** (1 - bits), 32) * 2 ** (bits - 1)
        like = write_like(tmp_path / f"like{bits}.gguf", model)
        quantize_(model, rtn(bits, 32, "signed"), but_the_ends)
        export(model, tmp_path / f"{bits}.gguf", "gguf", like=like)
        data = read(tmp_path / f"{bits}.gguf")[0]["blk.0.ffn_up.weight"].data[0, : 2 + 4 * bits]
        q = model.model.layers[0].mlp.up_proj.weight.dequantize()[0, :32].to(torch.int32)
        assert data[:2].view(np.float16) == 1.0
        if bits == 8:
            assert data[2:].view(np.int8).tolist() == q.tolist()
        else:
            assert data[2:].tolist() == [(int(q[j]) + 8) | (int(q[j + 16]) + 8) << 4 for j in range(16)]


@pytest.mark.parametrize("kind", [KINDS.F32, KINDS.F16, KINDS.Q8_0, KINDS.Q4_0])
@pytest.mark.parametrize("tied", [False, True])
def test_files_of_any_kind_to_graft_onto(tmp_path, kind, tied):
    """What the model has float and the file quantized is written as the model has it."""
    model = tiny_llama(dtype=torch.bfloat16, tied=tied)
    like = write_like(tmp_path / "like.gguf", model, kind=kind)
    quantize_(model, [("*.k_proj", None), ("*", rtn_int4(32))], but_the_ends)
    export(model, tmp_path / "a.gguf", "gguf", like=like)
    found, _ = read(tmp_path / "a.gguf")
    assert ("output.weight" in found) == (not tied)
    expected = permuted(model.model.layers[1].self_attn.k_proj.weight.detach().float(), 2)
    assert torch.equal(floats(found["blk.1.attn_k.weight"]), expected)
    assert torch.equal(floats(found["token_embd.weight"]), model.model.embed_tokens.weight.detach().float())
    assert found["token_embd.weight"].tensor_type == (kind if kind in (KINDS.F32, KINDS.F16) else KINDS.BF16)


def test_ends(tmp_path):
    """An embedding that is quantized, and an output layer of its own where the file's is tied."""
    model = tiny_llama(dtype=torch.bfloat16, tied=True)
    like = write_like(tmp_path / "like.gguf", model)
    quantize_(model, rtn_int8(32), lambda module, fqn: isinstance(module, nn.Linear))
    export(model, tmp_path / "a.gguf", "gguf", like=like)
    found, _ = read(tmp_path / "a.gguf")
    assert (found["output.weight"].tensor_type, found["token_embd.weight"].tensor_type) == (
        KINDS.Q8_0,
        KINDS.BF16,
    )
    assert torch.equal(floats(found["output.weight"]), model.lm_head.weight.dequantize(torch.float32))
    both = tiny_llama(dtype=torch.bfloat16, tied=True)
    quantize_(both, rtn_int8(32), lambda module, fqn: isinstance(module, nn.Linear | nn.Embedding))
    export(both, tmp_path / "b.gguf", "gguf", like=like)
    found, _ = read(tmp_path / "b.gguf")
    assert "output.weight" not in found
    assert torch.equal(floats(found["token_embd.weight"]), both.lm_head.weight.dequantize(torch.float32))


@pytest.mark.parametrize(
    ("name", "architecture"), [("Mixtral", "llama"), ("Qwen3Moe", "qwen3moe"), ("Qwen2Moe", "qwen2moe")]
)
def test_experts_are_one_tensor(tmp_path, name, architecture):
    model = tiny_moe(name, torch.bfloat16)
    like = write_like(tmp_path / "like.gguf", model, architecture)
    quantize_(model, rtn_int4(32))
    report = export(model, tmp_path / "a.gguf", "gguf", like=like)
    found, _ = read(tmp_path / "a.gguf")
    experts = model.model.layers[1].mlp.experts
    up = experts.gate_up_proj.dequantize(torch.float32)
    assert torch.equal(floats(found["blk.1.ffn_gate_exps.weight"]), up[:, :96])
    assert torch.equal(floats(found["blk.1.ffn_up_exps.weight"]), up[:, 96:])
    assert torch.equal(
        floats(found["blk.1.ffn_down_exps.weight"]), experts.down_proj.dequantize(torch.float32)
    )
    assert found["blk.1.ffn_gate_inp.weight"].tensor_type == KINDS.BF16
    assert ("not tried with models of the kind" in report.engines[0]) == (architecture != "llama")


def test_norms_that_are_stored_less_one(tmp_path):
    config = GemmaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        model.model.norm.weight.normal_()
    like = write_like(
        tmp_path / "like.gguf",
        model,
        "gemma",
        change=lambda name, t: t + 1 if name.endswith("norm.weight") else t,
    )
    quantize_(model, rtn_int4(32), but_the_ends)
    export(model, tmp_path / "a.gguf", "gguf", like=like)
    got = floats(read(tmp_path / "a.gguf")[0]["output_norm.weight"])
    assert torch.equal(got, model.model.norm.weight.detach().float() + 1)


@pytest.mark.parametrize(
    ("scale", "why"),
    [(2.0**14, None), (1e-9, "rounded to float16"), (2.0**24, "beyond float16")],
)
def test_scales_that_float16_cannot_hold(tmp_path, scale, why):
    model = tiny_llama(dtype=torch.bfloat16, tied=True)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(scale)
    like = write_like(tmp_path / "like.gguf", model, kind=KINDS.F32)
    quantize_(model, rtn_int8(32), but_the_ends)
    if why == "beyond float16":
        with pytest.raises(
            ValueError, match=r"0.mlp.up_proj.weight: a scale of .* is beyond float16, .*leave it float"
        ):
            export(model, tmp_path / "a.gguf", "gguf", like=like)
        assert [file.name for file in tmp_path.iterdir()] == ["like.gguf"]
        return
    report = export(model, tmp_path / "a.gguf", "gguf", like=like)
    assert ("The scales of 1 weights are rounded to float16" in "".join(report.changes)) == (why is not None)


def test_float32_scales_are_rounded(tmp_path):
    model = tiny_llama(tied=True)
    like = write_like(tmp_path / "like.gguf", model)
    quantize_(model, rtn_int8(32), but_the_ends)
    report = export(model, tmp_path / "a.gguf", "gguf", like=like)
    assert "The scales of 14 weights are rounded to float16, which blocks have." in report.changes
    got = floats(read(tmp_path / "a.gguf")[0]["blk.0.ffn_up.weight"])
    expected = model.model.layers[0].mlp.up_proj.weight.to(torch.float16).dequantize(torch.float32)
    assert torch.equal(got, expected)


# ------------------------------------------------------------------------------- mistakes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A quantized model, and a file to graft it onto."""
    folder = tmp_path_factory.mktemp("made")
    model = tiny_llama(dtype=torch.bfloat16, tied=True)
    like = write_like(folder / "like.gguf", model)
    quantize_(model, rtn_int4(32), but_the_ends)
    return model, like


def swap(t):
    return np.ascontiguousarray(t[::-1])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"change": lambda name, t: swap(t) if name == "blk.1.ffn_up.weight" else t}, "blk.1.ffn_up.weight holds other numbers than model.layers.1.mlp.up_proj.weight"),
        ({"change": lambda name, t: swap(t) if name == "blk.0.attn_q.weight" else t}, "blk.0.attn_q.weight holds other numbers"),
        ({"change": lambda name, t: t * 1.05 if name == "output_norm.weight" else t}, "output_norm.weight holds other numbers"),
        ({"change": lambda name, t: t[:-1] if name == "token_embd.weight" else t}, r"token_embd.weight has shape \[319, 96\], and model.embed_tokens.weight \[320, 96\]"),
        ({"without": ("blk.1.ffn_up.weight",)}, "it has no tensor blk.1.ffn_up.weight, which model.layers.1.mlp.up_proj.weight is"),
        ({"change": lambda name, t: np.zeros_like(t) if name == "blk.0.ffn_up.weight" else t}, "blk.0.ffn_up.weight holds other"),
        ({"architecture": "gemma"}, "blk.0.attn_q.weight holds other|no name"),
    ],
)  # fmt: skip
def test_a_file_of_another_model(tmp_path, made, arguments, why):
    like = write_like(tmp_path / "like.gguf", tiny_llama(dtype=torch.bfloat16, tied=True), **arguments)
    if (
        "architecture" in arguments
    ):  # which has the rows in their own order, which is right for the model, too
        export(made[0], tmp_path / "a.gguf", "gguf", like=like)
        return
    with pytest.raises(ValueError, match=f"like.gguf: {why}") as caught:
        export(made[0], tmp_path / "a.gguf", "gguf", like=like)
    assert "give the GGUF file of this very model" in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["like.gguf"]


def test_a_file_with_more(tmp_path, made):
    like = write_like(tmp_path / "like.gguf", tiny_llama(dtype=torch.bfloat16, tied=True, layers=3))
    with pytest.raises(ValueError, match=r"it has blk.2.\w+.weight, of which the model has nothing"):
        export(made[0], tmp_path / "a.gguf", "gguf", like=like)


@pytest.mark.parametrize("length", [0, 3, 4, 40, 2000, -100])
def test_a_damaged_file(tmp_path, made, length):
    model, like = made
    (tmp_path / "like.gguf").write_bytes(like.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"like.gguf is no GGUF file of a model that gguf knows"):
        export(model, tmp_path / "a.gguf", "gguf", like=tmp_path / "like.gguf")


def test_names(tmp_path, made):
    model, like = made
    with pytest.raises(ValueError, match=r"format='gguf' needs like, a GGUF file of the same model"):
        export(model, tmp_path / "a.gguf", "gguf")
    with pytest.raises(ValueError, match=r"a does not end in .gguf"):
        export(model, tmp_path / "a", "gguf", like=like)
    with pytest.raises(FileNotFoundError, match=r"none.gguf is not there"):
        export(model, tmp_path / "a.gguf", "gguf", like=tmp_path / "none.gguf")
    with pytest.raises(ValueError, match=r"like.gguf is the file that is read"):
        export(model, like, "gguf", like=like, force=True)
    with pytest.raises(ValueError, match="is a folder and no regular file"):
        export(model, tmp_path / "a.gguf", "gguf", like=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_existing_files(tmp_path, made):
    model, like = made
    file = tmp_path / "a.gguf"
    file.write_text("precious")
    with pytest.raises(FileExistsError, match=r"a.gguf exists; choose another name, or pass force=True"):
        export(model, file, "gguf", like=like)
    assert file.read_text() == "precious"
    export(model, file, "gguf", like=like, force=True)
    assert file.stat().st_size > 10_000
    (tmp_path / "b.gguf").mkdir()
    with pytest.raises(FileExistsError, match="only a file is replaced"):
        export(model, tmp_path / "b.gguf", "gguf", like=like, force=True)
    (tmp_path / "c.gguf").symlink_to(file)
    with pytest.raises(FileExistsError, match="only a file is replaced"):
        export(model, tmp_path / "c.gguf", "gguf", like=like, force=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "c.gguf"]


def test_a_full_disk(tmp_path, made, monkeypatch):
    model, like = made
    write = gguf.GGUFWriter.write_tensor_data
    written = []

    def full(self, tensor, *args):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(tensor)
        write(self, tensor, *args)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        export(model, tmp_path / "a.gguf", "gguf", like=like)
    assert caught.value.filename == str(tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_no_whole_blocks(tmp_path):
    model = AutoModelForCausalLM.from_config(
        GemmaConfig(vocab_size=320, hidden_size=64, intermediate_size=100, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32), dtype=torch.bfloat16,
    ).eval()  # fmt: skip
    like = write_like(
        tmp_path / "like.gguf", model, "gemma", change=lambda n, t: t + 1 if n.endswith("norm.weight") else t
    )
    quantize_(model, rtn_int8(-1), but_the_ends)
    with pytest.raises(
        ValueError, match=r"down_proj.weight: K = 100 is no multiple of 32, .*; leave it float"
    ):
        export(model, tmp_path / "a.gguf", "gguf", like=like)


def test_from_our_folder(tmp_path, made):
    model, like = made
    save(model, tmp_path / "ours")
    export(model, tmp_path / "a.gguf", "gguf", like=like)
    export(load(tmp_path / "ours"), tmp_path / "b.gguf", "gguf", like=like)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
