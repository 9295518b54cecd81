"""`refine_`, through the public API."""

import copy
import re
import threading

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from tiny_llama import tiny_llama
from tiny_moe import tiny_moe
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from rtn_tensor import RTNQuantizedTensor, load, quantize_, refine_, report, rtn, rtn_int4, rtn_int8, save

CONFIG = rtn_int4(32, "search")
SMALL = {"sequences": 4, "length": 64}


def mild(**kwargs):
    """A `tiny_llama` with logits of a trained model's size."""
    model = tiny_llama(**kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.3 if p.dim() > 1 else 1.0)
    return model


@pytest.fixture(scope="module")
def model():
    return mild()


@torch.no_grad()
def divergence(model, reference, ids):
    one, two = (m(ids, use_cache=False).logits.float().log_softmax(-1) for m in (reference, model))
    return float((one.exp() * (one - two)).sum(-1).mean())


def own_text(model, seed=5, sequences=8, length=64):
    torch.manual_seed(seed)
    start = torch.zeros(sequences, 1, dtype=torch.long)
    return model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, min_new_tokens=length,
        max_new_tokens=length, pad_token_id=0,
    )  # fmt: skip


def quantized(model):
    return {name: p for name, p in model.named_parameters() if isinstance(p, RTNQuantizedTensor)}


def same_weights(one, other):
    one, other = quantized(one), quantized(other)
    return one.keys() == other.keys() and all(
        torch.equal(w.qdata, other[name].qdata) and torch.equal(w.scale, other[name].scale)
        for name, w in one.items()
    )


# ------------------------------------------------------------------------- what it gives


def test_it_diverges_less_on_text_that_it_has_not_seen(model):
    plain, refined = copy.deepcopy(model), copy.deepcopy(model)
    quantize_(plain, CONFIG)
    refine_(refined, CONFIG, length=128)
    ids = own_text(model)
    assert divergence(refined, model, ids) < 0.9 * divergence(plain, model, ids)
    # The same format and size.
    assert [(r.name, r.shape, r.bits, r.group_size, r.bytes_after) for r in report(refined).rows] == [
        (r.name, r.shape, r.bits, r.group_size, r.bytes_after) for r in report(plain).rows
    ]
    assert {w.scale_method for w in quantized(refined).values()} == {"search"}


def test_it_is_deterministic_and_draws_from_no_generator_of_the_user(model):
    state = torch.get_rng_state()
    one, two, other = (copy.deepcopy(model) for _ in range(3))
    refine_(one, CONFIG, **SMALL)
    refine_(two, CONFIG, **SMALL)
    refine_(other, CONFIG, **SMALL, seed=1)
    assert same_weights(one, two)
    assert not same_weights(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_report():
    model = mild(tied=True, dtype=torch.bfloat16, layers=1)
    result = refine_(
        model,
        [("lm_head", None), ("*.k_proj", None), ("*", rtn_int4(32))],
        tokens=torch.arange(128).view(2, 64),
    )
    # The numbers depend on the last bits of the kernels.
    assert_expected_inline(
        re.sub(r"0\.\d+", "0.##", str(result)),
        """\
weight                                     shape   bits  group  bytes before  bytes after  note
--------------------------------------  --------  -----  -----  ------------  -----------  ------------------------------------------
model.embed_tokens.weight               320 x 96  float               61,440       61,440  not selected
model.layers.0.self_attn.q_proj.weight   96 x 96      4     32        18,432        5,184  refined: 0.## times plain rounding's error
model.layers.0.self_attn.k_proj.weight   48 x 96  float                9,216        9,216  not selected
model.layers.0.self_attn.v_proj.weight   48 x 96      4     32         9,216        2,592  refined: 0.## times plain rounding's error
model.layers.0.self_attn.o_proj.weight   96 x 96      4     32        18,432        5,184  refined: 0.## times plain rounding's error
model.layers.0.mlp.gate_proj.weight     160 x 96      4     32        30,720        8,640  refined: 0.## times plain rounding's error
model.layers.0.mlp.up_proj.weight       160 x 96      4     32        30,720        8,640  refined: 0.## times plain rounding's error
model.layers.0.mlp.down_proj.weight     96 x 160      4     32        30,720        8,640  refined: 0.## times plain rounding's error
lm_head.weight                          320 x 96  float                    0            0  shared with model.embed_tokens.weight
3 vectors                                         float                  576          576  norms and biases
total                                              8.41              209,472      110,112
refined on 128 given tokens: 0.## times the error of plain rounding in the weights' outputs; 0 weights kept plain rounding
divergence from the float model: 0.## nats per token on 128 of these""",
    )
    assert result.plain == []
    assert 0 < result.error < 1
    told = result.to_dict()
    assert told["error"] == result.error
    assert told["inputs"] == "128 given tokens"
    assert [row["note"][:8] for row in told["weights"] if row["name"].endswith("q_proj.weight")] == [
        "refined:"
    ]


def test_each_weight_has_its_own_format(model):
    model = copy.deepcopy(model)
    rules = [
        ("*.0.*", rtn_int8(32)),
        ("*.up_proj", None),
        ("model.embed_tokens", rtn_int4(32)),
        ("*", rtn(4, -1)),
    ]
    result = refine_(model, rules, **SMALL)
    formats = {name: (w.bits, w.group_size, w.scale_method) for name, w in quantized(model).items()}
    assert formats["model.layers.0.mlp.up_proj.weight"] == (8, 32, "absmax")
    assert formats["model.layers.1.mlp.down_proj.weight"] == (4, -1, "search")
    assert "model.layers.1.mlp.up_proj.weight" not in formats
    assert result.plain == ["model.embed_tokens.weight"]  # it is multiplied by nothing


def test_a_shared_weight_is_refined_once_and_stays_shared():
    model = mild(tied=True)
    refine_(model, [("*", rtn_int8()), ("model.embed_tokens.weight", rtn_int8())], **SMALL)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model = mild(tied=True)
    result = refine_(model, rtn_int8(), **SMALL)
    assert isinstance(model.lm_head.weight, RTNQuantizedTensor)
    assert not isinstance(model.model.embed_tokens.weight, RTNQuantizedTensor)
    assert "lm_head.weight" not in result.plain


def test_it_compiles_saves_and_loads_as_any_other(model, tmp_path):
    model = copy.deepcopy(model)
    refine_(model, CONFIG, **SMALL)
    ids = torch.arange(10)[None]
    expected = model(ids).logits
    save(model, tmp_path / "q")
    again = load(tmp_path / "q")
    assert same_weights(again, model)
    torch.testing.assert_close(again(ids).logits, expected)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(ids).logits, expected)


def test_in_inference_mode_and_with_gradients_left_alone(model):
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    with torch.inference_mode():
        refine_(one, CONFIG, **SMALL)
    refine_(two, CONFIG, **SMALL)
    assert same_weights(one, two)
    assert two.model.norm.weight.requires_grad


# ------------------------------------------------------------------------- kinds of models


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


def test_conv1d():
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, bos_token_id=0, eos_token_id=1)
    )
    result = refine_(model.eval(), CONFIG, lambda module, name: type(module).__name__ == "Conv1D", **SMALL)
    assert result.plain == []
    assert result.error < 0.9


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


# ------------------------------------------------------------------------- what goes wrong


def unchanged(model, before):
    return all(p is before[name] for name, p in model.named_parameters())


def test_what_is_wrong_is_said_before_anything_is_changed(model):
    model = copy.deepcopy(model)
    before = dict(model.named_parameters())
    ids = torch.randint(99, (2, 32))
    for error, message, arguments in [
        (TypeError, "config is missing; give rtn_int4", ()),
        (TypeError, "config is an int", (4,)),
        (ValueError, "tokens and batches are both given", (CONFIG, None, ids, [{}])),
        (
            TypeError,
            "batches is a list; give a list of the model's keyword arguments",
            (CONFIG, None, None, [ids]),
        ),
        (TypeError, "batches is a list", (CONFIG, None, None, [])),
        (ValueError, "tokens is a list; give int64 tokens", (CONFIG, None, [[1, 2]])),
        (ValueError, r"tokens is torch.float32 \[2, 3\]", (CONFIG, None, torch.zeros(2, 3))),
    ]:
        names = ("config", "filter_fn", "tokens", "batches")
        with pytest.raises(error, match=message):
            refine_(model, **dict(zip(names, arguments, strict=False)))
    with pytest.raises(ValueError, match="sequences=0, length=256"):
        refine_(model, CONFIG, sequences=0)
    with pytest.raises(ValueError, match="training mode"):
        refine_(copy.deepcopy(model).train(), CONFIG)
    with pytest.raises(ValueError, match="is on meta, and refine_ needs it whole"):
        refine_(tiny_llama().to("meta"), CONFIG)
    assert unchanged(model, before)
    refine_(model, CONFIG, **SMALL)
    with pytest.raises(ValueError, match="already quantized"):
        refine_(model, CONFIG)


def test_inputs_that_are_not_finite_are_named_and_the_model_is_as_it_was():
    model = tiny_moe("Mixtral")
    config = model.config.to_dict()

    def broken(module, args):
        return (torch.full_like(args[0], torch.inf),)

    hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(broken)
    before = dict(model.named_parameters())
    with pytest.raises(
        ValueError, match=r"model.layers.1.self_attn.o_proj.weight: its inputs hold NaN or inf"
    ):
        refine_(model, CONFIG, tokens=torch.randint(99, (2, 32)))
    hook.remove()
    assert unchanged(model, before)
    assert model.config.to_dict() == config
    assert not any(module._forward_pre_hooks for module in model.modules())
    quantize_(model, CONFIG)
    assert model(torch.arange(5)[None]).logits.isfinite().all()


def test_an_error_in_the_model_comes_through_and_no_thread_is_left(model):
    model = copy.deepcopy(model)
    before, threads = dict(model.named_parameters()), threading.active_count()

    def fails(module, args):
        raise RuntimeError("of its own")

    model.model.layers[1].mlp.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="of its own"):
        refine_(model, CONFIG, tokens=torch.randint(99, (400, 32)))
    assert unchanged(model, before)
    assert threading.active_count() == threads


def test_an_interrupt_leaves_the_model_as_it_was(model):
    model = copy.deepcopy(model)
    before, threads = dict(model.named_parameters()), threading.active_count()

    def bar(modules):
        yield from modules[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refine_(model, CONFIG, tokens=torch.randint(99, (400, 32)), progress=bar)
    assert unchanged(model, before)
    assert threading.active_count() == threads


def test_a_large_divergence_is_warned_of(model):
    model = tiny_llama()
    with pytest.warns(
        UserWarning, match=r"differ from the float model's by .* nats per token on 512 more of its own"
    ):
        result = refine_(model, rtn_int4(-1), sequences=1)
    assert result.divergence > 0.3
    assert f"divergence from the float model: {result.divergence:.4f} nats per token" in str(result)


def test_progress(model):
    seen = []

    def bar(modules):
        for module in modules:
            yield module
            seen.append(module)

    refine_(copy.deepcopy(model), CONFIG, **SMALL, progress=bar)
    assert len(seen) == 15


def test_functional_products_see_the_refined_weight(model):
    model = copy.deepcopy(model)
    refine_(model, CONFIG, **SMALL)
    w, x = model.model.layers[0].mlp.up_proj.weight, torch.randn(3, 96)
    torch.testing.assert_close(F.linear(x, w), x @ w.dequantize().T)
