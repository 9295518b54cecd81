"""vLLM's own kernels under the plugin, `"kernel": "vllm"`: what they are given, bit for bit, and the tokens
of the one for CPUs."""

import re

import pytest
import tiny
import torch
from engine import ROUNDING, difference, engine, greedy, rtn
from torch import nn
from torchao.quantization import FqnToConfig
from transformers import AutoModelForCausalLM
from vllm import _custom_ops
from vllm.model_executor import parameter
from vllm.model_executor.kernels.linear import MPLinearLayerConfig
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.kernels.linear.mixed_precision.machete import MacheteLinearKernel
from vllm.model_executor.kernels.linear.mixed_precision.marlin import MarlinLinearKernel
from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_scales
from vllm.model_executor.layers.quantization.utils.marlin_utils_test import get_weight_perm, marlin_weights
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    gptq_pack,
    unpack_quantized_values_into_int32,
)

from rtn_tensor import RTNQuantizedTensor, load, ops, rtn_int4
from rtn_tensor.integrations.vllm import RTNQuantizationConfig
from rtn_tensor.integrations.vllm.linear import TYPES, RTNLinearMethod
from rtn_tensor.integrations.vllm.parameters import add_packed

N, K = 128, 256


@pytest.fixture
def one_rank(monkeypatch):
    """vLLM's parameters ask which rank they are of; outside an engine nobody knows."""
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)


@pytest.fixture(params=[(4, 32), (4, 128), (4, -1), (8, 64), (8, -1)], ids=str)
def case(request, one_rank):
    """A kernel's problem, a layer as the kernel gets it, and from the dequantized weight `q [K, N]`,
    unsigned, and `scale [G, N]`."""
    bits, group_size = request.param
    torch.manual_seed(0)
    w = RTNQuantizedTensor.from_float(torch.randn(N, K).bfloat16(), bits, group_size, "signed")
    layer = nn.Module()
    layer.bias = None
    add_packed(layer, w, None)
    columns = w.scale.float().repeat_interleave(K if group_size == -1 else group_size, dim=1)
    q = (w.dequantize(torch.float32) / columns).round().int() + 2 ** (bits - 1)
    assert q.min() == 0  # signed: each group reaches its lowest
    problem = MPLinearLayerConfig((K, N), (K, N), TYPES[bits], torch.bfloat16, group_size, zero_points=False)
    return problem, layer, q.t(), w.scale.t()


def test_packed_as_gptq(case):
    problem, layer, q, scale = case
    assert torch.equal(layer.weight_packed.t(), gptq_pack(q, problem.weight_type.size_bits, K, N))
    assert torch.equal(layer.weight_scale.t(), scale)


def test_marlin_gets_what_it_expects(case, monkeypatch):
    """vLLM's Marlin class prepares the layer, with vLLM's torch reference of the repacking in place of its
    CUDA kernel."""
    problem, layer, q, scale = case
    bits = problem.weight_type.size_bits

    def repack(words, size_k, size_n, num_bits, is_a_8bit):
        values = unpack_quantized_values_into_int32(words, problem.weight_type, 0)
        return marlin_weights(values, size_k, size_n, num_bits, get_weight_perm(num_bits))

    monkeypatch.setattr(_custom_ops, "gptq_marlin_repack", repack)
    MarlinLinearKernel(problem, "weight_packed", "weight_scale").process_weights_after_loading(layer)
    assert torch.equal(layer.weight_packed, marlin_weights(q, K, N, bits, get_weight_perm(bits)))
    assert torch.equal(layer.weight_scale, marlin_permute_scales(scale, K, N, problem.group_size))


@pytest.mark.parametrize("case", [(4, 32), (4, -1)], ids=str, indirect=True)  # it has no kernel for int8
def test_a_cpu_multiplies_by_it(case):
    problem, layer, q, scale = case
    kernel = CPUWNA16LinearKernel(problem, "weight_packed", "weight_scale", "weight_zero_point")
    kernel.process_weights_after_loading(layer)
    x = torch.randint(-8, 9, (5, K)).bfloat16()
    w = (q - 8).float() * scale.float().repeat_interleave(K // scale.shape[0], dim=0)
    y, expected = kernel.apply_weights(layer, x).float(), x.float() @ w
    # It rounds each weight to bf16 before, and the result after.
    assert ((y - expected).abs() <= 2**-8 * (expected.abs() + x.float().abs() @ w.abs())).all()


def test_machete_gets_what_it_expects(case, monkeypatch):
    problem, layer, q, scale = case
    monkeypatch.setattr(_custom_ops, "machete_prepack_B", lambda words, **types: words)
    MacheteLinearKernel(problem, "weight_packed", "weight_scale").process_weights_after_loading(layer)
    assert torch.equal(layer.weight_packed, gptq_pack(q, problem.weight_type.size_bits, K, N))
    assert torch.equal(layer.weight_scale, scale)


# ---------------------------------------------------------------------------- in an engine


@pytest.fixture
def llama(tmp_path):
    return tiny.make("llama", tmp_path / "llama")


@pytest.fixture
def calls(monkeypatch):
    """How often our op was called, and vLLM's for CPUs."""
    counts = {"linear": 0, "cpu_gemm_wna16": 0}

    def counted(module, name):
        op = getattr(module, name)

        def call(*args, **kwargs):
            counts[name] += 1
            return op(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(ops, "linear")
    counted(_custom_ops, "cpu_gemm_wna16")
    return counts


def test_tokens_and_reload(llama, tmp_path, calls):
    """vLLM's int4 kernel for CPUs, with an lm_head, and fresh weights in the same memory."""
    other = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.25).add_(0.01)
    other.bfloat16().save_pretrained(tmp_path / "other")
    options = rtn(kernel="vllm", bits=4, group_size=64, rules=[["lm_head", {"group_size": 32}]])
    with engine(llama, dtype="float16", **options) as llm:
        before = greedy(llm)
        assert calls == {"linear": 0, "cpu_gemm_wna16": calls["cpu_gemm_wna16"]}
        assert calls["cpu_gemm_wna16"] >= 16 * (2 * 4 + 1)
        model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
        packed = {
            name: p.data_ptr() for name, p in model.named_parameters() if name.endswith("weight_packed")
        }
        assert len(packed) == 2 * 4 + 1
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tmp_path / "other")})
        llm.reset_prefix_cache()
        after = greedy(llm)
        assert packed == {
            name: p.data_ptr() for name, p in model.named_parameters() if name.endswith("weight_packed")
        }
    config = FqnToConfig(
        {"lm_head": rtn_int4(32, "absmax"), r"re:.*\.layers\..*_proj": rtn_int4(64, "absmax")}
    )
    for path, generated in ((llama, before), (tmp_path / "other", after)):
        assert difference(load(path, config, dtype=torch.float16).float(), generated) < ROUNDING["float16"]
        assert difference(load(path), generated) > 10 * ROUNDING["float16"]


# ------------------------------------------------------------------------- what is refused


def test_another_kernel_is_refused():
    message = (
        "kernel='marlin' is not supported; use 'rtn' (this library's), or 'vllm' (vLLM's for mixed "
        "precision: Machete or Marlin on CUDA"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        RTNQuantizationConfig.from_config({"quant_method": "rtn", "kernel": "marlin"})


@pytest.mark.parametrize(
    ("options", "dtype", "reason"),
    [
        (
            {"bits": 8},
            torch.bfloat16,
            "in int8 g128; name it in ignore, give it another format, or drop kernel='vllm'. Failed to find "
            "a kernel",
        ),
        ({"bits": 4}, torch.float32, "they take dtype='bfloat16' and 'float16'"),
        ({"bits": 4, "group_size": 96}, torch.bfloat16, "its 256 columns are no multiple of 96"),
    ],
    ids=["no kernel", "float32", "a short last group"],
)
def test_layers_that_no_kernel_takes_are_refused(options, dtype, reason):
    config = RTNQuantizationConfig.from_config({"quant_method": "rtn", "kernel": "vllm", **options})
    method = RTNLinearMethod(config, config.options.default, "model.layers.0.mlp.down_proj")
    with pytest.raises(
        ValueError, match="model.layers.0.mlp.down_proj: vLLM has no kernel for this layer"
    ) as error:
        method.create_weights(nn.Module(), 256, [128], 256, 128, dtype, weight_loader=None)
    assert reason in str(error.value)


def test_experts_and_embeddings_are_refused(llama, tmp_path):
    experts = tiny.make("qwen3_moe", tmp_path / "experts")
    with pytest.raises(
        ValueError,
        match=r"model\.layers\.0\.mlp\.experts: kernel='vllm' is not supported " r"for experts; drop it",
    ):
        with engine(experts, dtype="float16", **rtn(kernel="vllm", bits=4)):
            pass
    options = rtn(kernel="vllm", bits=4, rules=[["model.embed_tokens", {}]])
    with pytest.raises(ValueError, match="model.embed_tokens: vLLM has no kernel for a quantized embedding"):
        with engine(llama, dtype="float16", **options):
            pass
