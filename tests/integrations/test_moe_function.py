"""The experts function that transformers runs, and experts that are copied, saved and loaded."""

import subprocess
import sys

import pytest
import torch
from test_moe import IDS, close, dense, each_model, logits, quantized, stacks
from tiny_moe import tiny_moe
from torch import nn
from torchao.quantization import FqnToConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

from rtn_tensor import (
    RTNQuantizedTensor,
    load,
    quantize_,
    reference,
    report,
    rtn_int4,
    rtn_int8,
    save,
)
from rtn_tensor.integrations.transformers.experts import activation_of, use_experts
from rtn_tensor.quantize.kinds import products as chosen

# ---------------------------------------------------------------------------- the function


def test_activations_are_recognised_by_what_they_compute():
    found = {
        name: {activation_of(m) for m in tiny_moe(name).modules() if hasattr(m, "has_gate")}
        for name in ("Mixtral", "GptOss")
    }
    assert found == {"Mixtral": {"silu"}, "GptOss": {"gpt_oss"}}
    block = tiny_moe("Mixtral").model.layers[0].mlp.experts
    block.act_fn = nn.GELU()
    assert activation_of(block) is None
    assert activation_of(nn.Linear(2, 2)) is None


def test_an_activation_that_no_kernel_has_is_the_modules_own():
    model = tiny_moe("Mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = nn.GELU()
    quantize_(model, rtn_int4(32))
    assert close(logits(model), logits(dense(model)))


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "Llama4"])
def test_gradients_pass_through(name):
    model = quantized(name)
    float_ = dense(model)
    for m in (model, float_):
        m.requires_grad_(False)
    x = model.get_input_embeddings()(IDS)
    grads = []
    for m in (model, float_):
        inputs = x.detach().clone().requires_grad_()
        m(inputs_embeds=inputs).logits.square().sum().backward()
        grads.append(inputs.grad)
    assert grads[0].abs().max() > 0
    assert (grads[0] - grads[1]).abs().max() <= 1e-4 * grads[1].abs().max()


def test_experts_of_another_machine_are_skipped():
    """transformers' expert parallelism gives them an index past the last, and no weight."""
    block = quantized("Mixtral").model.layers[0].mlp.experts
    block._is_expert_parallel = True
    x, weights = torch.randn(3, 64), torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]])
    index = torch.tensor([[0, 1], [2, 4], [4, 4]])
    with torch.no_grad():
        y = block(x, index, weights)
        assert close(y[1], block(x[1:2], torch.tensor([[2, 0]]), torch.tensor([[1.0, 0.0]]))[0])
    assert not y[2].any()


def test_autocast():
    model = quantized("Mixtral")
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(model)
    error = (got - logits(model)).abs().amax(-1)
    # Of most tokens: near a tie of the router, bf16 may choose other experts for one, which those after it see.
    assert error.median() < 0.02 * logits(model).abs().max()


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "Llama4"])
def test_compiles_whole_and_once(name):
    torch._dynamo.reset()
    model = quantized(name)
    layer = model.model.layers[0]
    block = layer.feed_forward if name == "Llama4" else layer.mlp
    compiled = torch.compile(block, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(4):
            x = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(seed)) * 3
            got, expected = compiled(x), block(x)
            for a, b in zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]:
                assert close(a, b)


def test_no_tokens():
    block = quantized("Mixtral").model.layers[0].mlp.experts
    with torch.no_grad():
        assert block(torch.zeros(0, 64), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)).shape == (
            0,
            64,
        )


# --------------------------------------------------------------------------- copies, files


def test_fresh_weights_into_parts():
    model = quantized("Mixtral")
    w = model.model.layers[0].mlp.experts.gate_up_proj
    fresh = torch.randn(4, 192, 64)
    expected = RTNQuantizedTensor.from_float(fresh, 4, 32)
    with torch.no_grad():
        w[2].copy_(fresh[2])
        w[:, :96].copy_(fresh[:, :96])
    assert torch.equal(w[2].qdata, expected[2].qdata)
    assert torch.equal(w.qdata[:, :96], expected.qdata[:, :96])
    swapped = quantized("GptOss").model.layers[0].mlp.experts.gate_up_proj
    with torch.no_grad():
        swapped[1].copy_(fresh[1].T)
    assert torch.equal(swapped[1].qdata, expected[1].qdata)


def same(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    assert a.keys() == b.keys()
    for name, w in a.items():
        if isinstance(w, RTNQuantizedTensor):
            assert torch.equal(w.qdata, b[name].qdata), name
            assert torch.equal(w.scale, b[name].scale), name
            assert w.transposed == b[name].transposed
        else:
            assert torch.equal(w, b[name]), name


@each_model
def test_loading_and_saving(name, tmp_path):
    """On the way from a float folder, as quantize_ afterwards; then by both savers, to both loaders, bit for
    bit."""
    tiny_moe(name, torch.bfloat16).save_pretrained(tmp_path / "float")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.bfloat16)
    quantize_(
        expected,
        rtn_int4(32),
        filter_fn=lambda module, fqn: fqn != "lm_head" and chosen(expected)(module, fqn),
    )
    model = load(tmp_path / "float", rtn_int4(32))
    same(model, expected)
    assert torch.equal(logits(model), logits(expected))
    save(model, tmp_path / "saved")
    again = load(tmp_path / "saved")
    same(again, model)
    assert torch.equal(logits(again), logits(model))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    same(theirs, model)
    assert (logits(theirs) - logits(model)).abs().max() <= 0.03 * logits(model).abs().max()
    use_experts(theirs)
    # Which adds a bias and takes it off again, where transformers itself read it quantized.
    if name != "Jamba":
        assert torch.equal(logits(theirs), logits(model))


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "Llama4", "Qwen3Moe"])
def test_transformers_quantizes_as_it_loads(name, tmp_path):
    """Experts, which it leaves float unless their names are given."""
    tiny_moe(name, torch.bfloat16).save_pretrained(tmp_path / "float")
    by_name = FqnToConfig({"re:.*_proj\\.weight": rtn_int4(32), "re:.*experts\\..*_proj": rtn_int4(32)})
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=TorchAoConfig(by_name)
    )
    expected = load(tmp_path / "float", by_name)
    same(model, expected)
    assert sum(isinstance(w, RTNQuantizedTensor) for w in stacks(model).values()) == 4
    assert torch.equal(logits(model), logits(expected))


def test_precision_by_part(tmp_path):
    model = tiny_moe("Qwen2Moe", torch.bfloat16)
    parts = FqnToConfig(
        {
            "re:.*experts\\.gate_up_proj": rtn_int4(32),
            "re:.*experts\\.down_proj": rtn_int8(96),
            "re:.*shared_expert\\..*": rtn_int8(32),
        }
    )
    quantize_(model, parts)
    bits = {
        row.name.split("mlp.")[-1]: (row.bits, row.group_size)
        for row in report(model).rows
        if "layers.1.mlp" in row.name
    }
    assert bits["experts.gate_up_proj"] == (4, 32)
    assert bits["experts.down_proj"] == (8, 96)
    assert bits["shared_expert.up_proj.weight"] == (8, 32)
    assert bits["gate.weight"] == (None, None)
    expected = logits(dense(model).float())
    assert (logits(model).float() - expected).abs().max() <= 0.05 * expected.abs().max()
    save(model, tmp_path / "saved")
    same(load(tmp_path / "saved"), model)


def test_sorted_once_a_layer(monkeypatch):
    calls = []
    find = reference.sorted_pairs
    monkeypatch.setattr(reference, "sorted_pairs", lambda *args: calls.append(1) or find(*args))
    logits(quantized("Mixtral"))
    assert len(calls) == 2


def test_a_pickled_model_runs_in_a_process_that_has_quantized_none(tmp_path):
    model = quantized("Mixtral")
    torch.save(model, tmp_path / "model.pt")
    torch.save(IDS, tmp_path / "ids.pt")
    read = "m, ids = (torch.load(f'{name}.pt', weights_only=False) for name in ('model', 'ids'))"
    subprocess.run(
        [sys.executable, "-c", f"import torch; {read}; torch.save(m(ids).logits, 'logits.pt')"],
        cwd=tmp_path,
        check=True,
    )
    assert close(torch.load(tmp_path / "logits.pt"), logits(model))
