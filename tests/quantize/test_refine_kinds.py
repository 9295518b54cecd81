"""`refine_` of models of other kinds, and from files."""

import copy

import pytest
import torch
from mild_model import CONFIG, SMALL, divergence, mild, own_text, same_weights
from tiny_llama import tiny_llama
from tiny_moe import tiny_moe
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DbrxConfig,
    DbrxForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from rtn_tensor import RTNQuantizedTensor, load, quantize_, refine_, save


def test_experts_are_refined_on_their_own_tokens():
    model = tiny_moe("Mixtral")
    plain = copy.deepcopy(model)
    before = copy.deepcopy(model)
    implementation = model.config._experts_implementation
    quantize_(plain, CONFIG)
    result = refine_(model, CONFIG, length=64)
    notes = {row.name: row.note for row in result.rows}
    assert notes["model.layers.0.mlp.experts.down_proj"].startswith("refined: 0.")
    ids = own_text(before)
    assert divergence(model, before, ids) < divergence(plain, before, ids)
    assert before.config._experts_implementation == implementation


@pytest.mark.parametrize("name", ["GptOss", "Qwen3Moe", "Llama4"])
def test_experts_however_they_lie_and_are_called(name):
    model = tiny_moe(name)
    result = refine_(model, CONFIG, length=64)
    experts = {row.name: row.note for row in result.rows if ".experts." in row.name and row.bits}
    assert len(experts) == 4
    assert all(note.startswith("refined: 0.") for note in experts.values()), experts


def test_an_expert_that_saw_too_few_tokens_keeps_plain_rounding():
    model = tiny_moe("Mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = -10 * layer.mlp.gate.weight[:3].sum(0)
    plain = copy.deepcopy(model)
    quantize_(plain, CONFIG)
    result = refine_(model, CONFIG, sequences=1, length=40)
    assert "experts keep plain rounding" in str(result) or "too few inputs" in str(result)
    one, other = (m.model.layers[0].mlp.experts.gate_up_proj for m in (model, plain))
    assert any(torch.equal(one.qdata[e], other.qdata[e]) for e in range(4))


def test_experts_whose_products_are_not_seen_keep_plain_rounding():
    """DBRX hands the rows of its matrices, a part for each expert, to another module."""
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
    experts = {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64}
    model = DbrxForCausalLM(
        DbrxConfig(
            d_model=64, n_heads=4, n_layers=1, vocab_size=128, attn_config=attention, ffn_config=experts
        )
    ).eval()
    with torch.no_grad():
        for w in model.parameters():
            w.normal_(std=0.1)
    plain = copy.deepcopy(model)
    quantize_(plain, CONFIG)
    result = refine_(model, CONFIG, tokens=torch.randint(128, (16, 64)))
    notes = {row.name: row.note for row in result.rows if ".experts." in row.name}
    assert set(notes.values()) == {"plain rounding, as no product by it was seen"}
    for name in notes:
        assert torch.equal(model.get_parameter(name).qdata, plain.get_parameter(name).qdata)
    qkv = "transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight"
    assert not torch.equal(model.get_parameter(qkv).qdata, plain.get_parameter(qkv).qdata)


def test_conv1d():
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, bos_token_id=0, eos_token_id=1)
    )
    result = refine_(model.eval(), CONFIG, lambda module, name: type(module).__name__ == "Conv1D", **SMALL)
    assert result.plain == []
    assert result.error < 0.9


def test_torchs_attention():
    """Of queries that look at other keys the inputs are those of some of the rows only, and it keeps plain
    rounding."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    x = torch.randn(8, 9, 64) @ torch.randn(64, 64)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    result = refine_(model, CONFIG, batches=[{"src": x}])
    notes = {row.name: row.note for row in result.rows if row.bits}
    for name in ("self_attn.in_proj_weight", "linear1.weight", "linear2.weight"):
        assert notes[f"layers.1.{name}"].startswith("refined: 0."), notes
    assert torch.backends.mha.get_fastpath_enabled()
    model = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    result = refine_(model, CONFIG, batches=[{"query": x, "key": x + 1, "value": x + 1}])
    assert "in_proj_weight" in result.plain


def test_batches_of_an_encoder():
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=99
        )
    ).eval()
    ids = torch.randint(99, (4, 20))
    batches = [{"input_ids": ids[i : i + 2], "attention_mask": torch.ones(2, 20)} for i in (0, 2)]
    result = refine_(model, CONFIG, batches=batches)
    assert result.inputs == "2 given batches"
    assert result.divergence is None
    assert result.plain == ["pooler.dense.weight"]  # it has one input for each sequence
    with pytest.raises(
        TypeError, match="BertModel is no causal language model of transformers.*tokens, or batches"
    ):
        refine_(BertModel(model.config).eval(), CONFIG)


def test_padding_does_not_count():
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=99
        )
    ).eval()
    ids, mask = torch.randint(99, (4, 40)), torch.ones(4, 40, dtype=torch.long)
    mask[:, 30:] = 0
    one, two, three = (copy.deepcopy(model) for _ in range(3))
    refine_(one, CONFIG, batches=[{"input_ids": ids, "attention_mask": mask}])
    refine_(two, CONFIG, batches=[{"input_ids": ids.where(mask > 0, 7), "attention_mask": mask}])
    refine_(three, CONFIG, batches=[{"input_ids": ids}])
    assert same_weights(one, two)
    assert not same_weights(one, three)


def test_batches_of_an_encoder_and_decoder_and_of_several_lengths():
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=64, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=99, num_mel_bins=8, max_source_positions=50,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    batches = [
        {"input_features": torch.randn(2, 8, 100), "decoder_input_ids": torch.randint(99, (2, t))}
        for t in (5, 20)
    ]
    result = refine_(model, [("model.*", CONFIG)], batches=batches)
    assert result.plain == []  # cross attention's, too
    assert result.error < 0.95


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.left, self.right, self.unused = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        x = self.first(x)
        return self.left(x) if x.shape[0] % 2 else self.right(self.right(x))


def test_passes_that_come_to_other_modules():
    model = Branching().eval()
    result = refine_(model, CONFIG, batches=[{"x": torch.randn(n, 64)} for n in (50, 51, 52, 53)])
    assert result.plain == ["unused.weight"]
    assert all(isinstance(m.weight, RTNQuantizedTensor) for m in model.children())


def test_a_model_that_is_not_transformers_takes_tokens():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 64), nn.Linear(64, 50)

        def forward(self, ids):
            return self.head(self.embed(ids))

    result = refine_(Model().eval(), CONFIG, tokens=torch.randint(50, (4, 32)))
    assert result.plain == []
    assert result.divergence is None


# ------------------------------------------------------------------------- from files


@pytest.mark.parametrize("make", [mild, lambda: tiny_moe("Mixtral"), lambda: mild(tied=True)])
def test_from_files_the_weights_are_the_same(make, tmp_path):
    make().save_pretrained(tmp_path)
    ids = torch.randint(99, (8, 32))
    in_memory, from_files = load(tmp_path), load(tmp_path, CONFIG)
    result = refine_(from_files, source=tmp_path, tokens=ids)
    rules = [("lm_head", None), ("*", CONFIG)]
    assert refine_(in_memory, rules, tokens=ids).error == result.error
    assert same_weights(in_memory, from_files)
    assert result.divergence is None


def test_from_files_the_quantized_model_writes_the_text(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    model = load(tmp_path, CONFIG)
    assert refine_(model, source=tmp_path, **SMALL).inputs == "256 tokens of its own"


def test_from_files_it_says_what_is_wrong(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "float")
    model = load(tmp_path / "float", CONFIG)
    save(model, tmp_path / "quantized")
    with pytest.raises(ValueError, match="with source= each quantized weight keeps its format"):
        refine_(model, CONFIG, source=tmp_path / "float")
    with pytest.raises(ValueError, match="no weight of the model is quantized"):
        refine_(tiny_llama(), source=tmp_path / "float")
    with pytest.raises(ValueError, match=r"model.safetensors: .* is quantized; give the float checkpoint"):
        refine_(model, source=tmp_path / "quantized")
    with pytest.raises(FileNotFoundError):
        refine_(model, source=tmp_path / "nowhere")
    tiny_llama(layers=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="the checkpoint does not fit the model"):
        refine_(model, source=tmp_path / "other")
