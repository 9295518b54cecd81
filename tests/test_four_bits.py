"""The benchmark of four models: that what it measures is what it says, on models made in milliseconds."""

import itertools
import json
import struct
import sys

import pytest
import torch
from tiny_llama import tiny_llama
from transformers import BertConfig, BertModel, WhisperConfig, WhisperForConditionalGeneration

from benchmarks import ctranslate2, four_bits, real_data
from rtn_tensor import dequantize_, quantize_, rtn_int4, rtn_int8

FLOAT, INT8, INT4 = (
    four_bits.METHODS["float"],
    four_bits.plain(rtn_int8(32)),
    four_bits.plain(rtn_int4(32)),
)
END, PROMPT = 2, [4, 5]


def tiny_whisper(dtype=torch.float32):
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=64,
        d_model=64,
        num_mel_bins=8,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_source_positions=20,
        max_target_positions=24,
        decoder_start_token_id=PROMPT[0],
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        init_std=0.3,
    )
    return WhisperForConditionalGeneration(config).to(dtype).eval()


def tiny_bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=100, initializer_range=0.3, **sizes)).to(torch.float16).eval()


def test_causal_language_model():
    ids = torch.randint(2, 320, (60,), generator=torch.Generator().manual_seed(0))
    case = four_bits.causal(lambda: tiny_llama(dtype=torch.bfloat16), ids, window=40, first=0)
    assert case.inputs() == {}
    exactly, int8, int4 = (four_bits.row(case, method) for method in (FLOAT, INT8, INT4))
    assert (exactly["kl"], exactly["top1"], exactly["bits_per_weight"]) == (0, 1, None)
    assert 0 < int8["kl"] < int4["kl"]
    assert (int8["bits_per_weight"], int4["bits_per_weight"]) == (8.5, 4.5)

    model = tiny_llama(dtype=torch.bfloat16).float()
    with torch.inference_mode():
        losses = [
            torch.nn.functional.cross_entropy(
                model(torch.cat([torch.tensor([0]), part])[None]).logits[0, :-1], part, reduction="none"
            )
            for part in (ids[:40], ids[40:])
        ]
    assert exactly["perplexity"] == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-5)


def test_divergence():
    one, two = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log(), torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    kl = 0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log()
    torch.testing.assert_close(four_bits.divergences(one, two), torch.tensor([kl, 0]).double())


def test_encoder_leaves_padding_out():
    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(1, 100, (3, 9), generator=generator)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    longer = {key: torch.nn.functional.pad(value, (0, 5)) for key, value in batch.items()}
    rows = [
        [
            four_bits.row(four_bits.encoder(tiny_bert, [given], [batch]), method)
            for method in (FLOAT, INT8, INT4)
        ]
        for given in (batch, longer)
    ]
    for exactly, int8, int4 in rows:
        assert exactly["distance"] == pytest.approx(0, abs=1e-12)
        assert 0 < int8["distance"] < int4["distance"]
    assert rows[0][2]["distance"] == pytest.approx(rows[1][2]["distance"], rel=1e-3)


def test_a_peer_is_measured_by_the_weights_of_its_folder(tmp_path):
    ids = torch.randint(2, 320, (60,), generator=torch.Generator().manual_seed(0))
    case = four_bits.causal(lambda: tiny_llama(dtype=torch.bfloat16), ids)
    theirs = tiny_llama(dtype=torch.bfloat16)
    quantize_(theirs, rtn_int4(32), four_bits.but_the_output(theirs))
    dequantize_(theirs)
    theirs.save_pretrained(tmp_path)
    ours, peer = (four_bits.row(case, method) for method in (INT4, four_bits.peer(str(tmp_path))))
    # The folder has weights of 16 bits, and what is measured of ours is exact.
    assert peer["kl"] == pytest.approx(ours["kl"], rel=0.05)
    assert peer["bits_per_weight"] is None


def test_transcriber():
    generator = torch.Generator().manual_seed(0)
    features, other = (torch.randn(n, 8, 40, generator=generator) for n in (2, 1))
    case = four_bits.transcriber(
        lambda: tiny_whisper(torch.float16),
        features,
        [[7, 8, 9], None],
        [other],
        PROMPT,
        words=lambda ids: [str(i) for i in ids],
        longest=12,
    )
    (batch,) = case.inputs()["batches"]
    tokens = batch["decoder_input_ids"][0].tolist()
    assert tokens[:2] == PROMPT
    assert tokens[-1] == END
    assert len(tokens) > 3
    tiny_whisper(torch.float16)(**batch)  # as a model can be refined on it
    exactly, int8, int4 = (four_bits.row(case, method) for method in (FLOAT, INT8, INT4))
    assert {exactly[key] for key in ("kl", "kl_own", "kl_said", "word_errors")} == {0}
    for key in ("kl", "kl_own", "kl_said"):
        assert 0 < int8[key] < int4[key]


def test_edits():
    assert four_bits.edits("a b c".split(), "a b c".split()) == 0
    assert four_bits.edits("a c".split(), "a b c".split()) == 1
    assert four_bits.edits("x a b d".split(), "a b c".split()) == 2
    assert four_bits.edits([], ["a"]) == 1


def test_sentences_come_from_all_over_the_text():
    text = " ".join(f"This is the sentence of number {i}." for i in range(100))
    assert real_data.sentences(text, 4) == [f"This is the sentence of number {i}." for i in (0, 25, 50, 75)]


def test_rows_are_kept_and_replaced(tmp_path, monkeypatch):
    ids = torch.arange(2, 40)
    monkeypatch.setattr(
        four_bits, "CASES", {name: lambda: four_bits.causal(tiny_llama, ids) for name in ("one", "two")}
    )
    file = tmp_path / "rows.json"

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["four_bits", "--threads", "1", "--json", str(file), *arguments])
        four_bits.main()
        made = json.loads(file.read_text())
        assert made["machine"]["torch"] == torch.__version__
        return {(row["model"], row["method"]): row for row in made["rows"]}

    first = run("--model", "one", "--only", "int4 g32 search", "--only", "float")
    second = run("--only", "int4 g32 search")
    assert list(second) == [("one", "int4 g32 search"), ("one", "float"), ("two", "int4 g32 search")]
    assert second["one", "float"] == first["one", "float"]


def write_ctranslate2(path, model):
    """`model` as CTranslate2 writes a Whisper: layers under its names, queries, keys and values stacked."""
    weights = {f"model.{name}": weight for name, weight in model.model.state_dict().items()}
    leaves = {"embed_positions.weight": "encodings", "layer_norm.weight": "gamma", "layer_norm.bias": "beta"}
    variables = {"encoder/num_heads": torch.tensor(2, dtype=torch.int16)}
    for side in ("encoder", "decoder"):
        places = [(theirs, [ours]) for theirs, ours in ctranslate2.OUTER.items()]
        for i, (theirs, ours) in itertools.product(range(2), ctranslate2.LAYER.items()):
            places.append((f"layer_{i}/{theirs}", [f"layers.{i}.{module}" for module in ours.split(",")]))
        for (theirs, modules), leaf in itertools.product(places, ("weight", "bias")):
            names = [f"model.{side}.{module}.{leaf}" for module in modules]
            if any(name in weights for name in names):
                kind = next((new for end, new in leaves.items() if names[0].endswith(end)), leaf)
                # Keys have no bias; CTranslate2 stacks zeros.
                parts = [weights.get(name, torch.zeros(64)) for name in names]
                variables[f"{side}/{theirs}/{kind}"] = torch.cat(parts)
    with path.open("wb") as file:

        def string(text):
            file.write(struct.pack("<H", len(text) + 1) + text.encode() + b"\0")

        file.write(struct.pack("<I", 6))
        string("WhisperSpec")
        file.write(struct.pack("<II", 3, len(variables)))
        for name, value in variables.items():
            string(name)
            data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            file.write(struct.pack(f"<B{value.dim()}I", value.dim(), *value.shape))
            file.write(struct.pack("<BI", ctranslate2.DTYPES.index(value.dtype), len(data)) + data)


def test_whisper_of_ctranslate2(tmp_path):
    model = tiny_whisper()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)  # else all biases are zero and all norms one
    write_ctranslate2(tmp_path / "model.bin", model)
    read = ctranslate2.read(tmp_path / "model.bin")
    assert read["encoder/num_heads"] == 2
    made = ctranslate2.weights(read)
    assert made.keys() == {f"model.{name}" for name in model.model.state_dict()}
    for name, weight in model.model.state_dict().items():
        assert torch.equal(made[f"model.{name}"], weight), name

    (tmp_path / "old.bin").write_bytes(struct.pack("<I", 5))
    with pytest.raises(ValueError, match="version 5"):
        ctranslate2.read(tmp_path / "old.bin")
