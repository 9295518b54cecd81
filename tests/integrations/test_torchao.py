"""torchao's own tests of a tensor subclass (torchao.testing.utils) on this one, and torchao's `quantize_`."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.transform_module import _QUANTIZE_CONFIG_HANDLER
from torchao.testing.model_architectures import LlamaModelsLlama4Experts
from torchao.testing.utils import TorchAOBasicTestCase, TorchAOCompileTestCase
from torchao.utils import TorchAOBaseTensor

from rtn_tensor import RTNQuantizedTensor, rtn_int4, rtn_int8

CONFIGS = [rtn_int4(32), rtn_int4(128), rtn_int8(32), rtn_int8(-1)]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"int{c.bits}-{c.group_size}")


class _OnCpu:
    """Their `.cuda()` runs where there is CUDA; elsewhere it would only show that there is none."""

    COMMON_DEVICES = ["cpu"]
    TENSOR_SUBCLASS = RTNQuantizedTensor
    FACTORY_FN = staticmethod(RTNQuantizedTensor.from_float)

    def test_device1_to_device2_device1_cpu_device2_cpu(self):
        w = self.FACTORY_FN(torch.randn(4, 128, dtype=torch.bfloat16), **self.kwargs)
        for moved in (w.to(device="cpu"), w.to("cpu"), w.cpu()):
            assert torch.equal(moved, w)


class TestBasicInt4(_OnCpu, TorchAOBasicTestCase):
    kwargs = {"bits": 4, "group_size": 32}
    LINEAR_MIN_SQNR = 15


class TestBasicInt8(_OnCpu, TorchAOBasicTestCase):
    kwargs = {"bits": 8, "group_size": 32}
    LINEAR_MIN_SQNR = 40


class TestCompileInt4(_OnCpu, TorchAOCompileTestCase):
    kwargs = {"bits": 4, "group_size": 32}
    LINEAR_MIN_SQNR = 15
    test_device1_to_device2_device1_cpu_device2_cpu = None


class TestCompileInt8(_OnCpu, TorchAOCompileTestCase):
    kwargs = {"bits": 8, "group_size": 32}
    LINEAR_MIN_SQNR = 40
    test_device1_to_device2_device1_cpu_device2_cpu = None


# ---------------------------------------------------- TorchAOIntegrationTestCase, off CUDA


@every_config
def test_slice_and_copy_similar_to_vllm(config):
    layer, loaded = (nn.Linear(256, 256, dtype=torch.bfloat16) for _ in range(2))
    quantize_(layer, config)
    quantize_(loaded, config)
    for rank in (0, 1):
        part = layer.weight.data.narrow(0, 128 * rank, 128)
        new = loaded.weight.narrow(0, 128 * rank, 128)
        assert not torch.equal(part.qdata[0], new.qdata[0])
        part.copy_(new)
        assert torch.equal(part.qdata, new.qdata)
        assert torch.equal(part.scale, new.scale)
    assert torch.equal(layer.weight, loaded.weight)


@every_config
def test_narrow_similar_to_vllm(config):
    layer = nn.Linear(256, 64, dtype=torch.bfloat16)
    quantize_(layer, config)
    new = layer.weight.narrow(1, 0, 256)
    for name in new.tensor_data_names:
        assert getattr(new, name).dim() == getattr(layer.weight, name).dim()
    assert torch.equal(new, layer.weight)


@every_config
def test_quantize_3d_param_similar_to_vllm(config):
    with torch.device("meta"):
        layer = nn.Linear(1024, 1024, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(torch.randn(6, 72, 128, dtype=torch.bfloat16))
    dense = layer.weight.detach()
    quantize_(layer, config)
    assert layer.weight[0].shape == (72, 128)
    expected = RTNQuantizedTensor.from_float(dense[0], config.bits, config.group_size)
    assert torch.equal(layer.weight[0], expected)


@pytest.mark.parametrize("dim", [0, 1, 2])
@every_config
def test_chunk_similar_to_vllm_llama4(config, dim):
    if config.group_size == -1 and dim == 2:
        pytest.skip("its rows have one scale: cat along in_features raises")
    w = RTNQuantizedTensor.from_float(torch.randn(2, 64, 256), config.bits, config.group_size)
    assert torch.equal(torch.cat(w.chunk(2, dim=dim), dim=dim), w)


@every_config
def test_moe_weight_reshape_ops(config):
    """Experts [E, K, N] are transposed, quantized, and used transposed; resharding joins two models' halves.

    Left out: the [E * K, N] that torchao makes on the way, whose last dim would not be the packed one.
    """
    experts, dim, hidden = 2, 128, 256
    x = torch.randn(4, 64, dim)
    models = [LlamaModelsLlama4Experts(experts, dim, hidden, torch.float32, "cpu") for _ in range(2)]
    for moe in models:
        before = moe(x)
        for name in ("w1", "w2", "w3"):
            setattr(moe, name, nn.Parameter(getattr(moe, name).detach().transpose(1, 2).contiguous()))
            _QUANTIZE_CONFIG_HANDLER[type(config)](moe, config, parameter_name=name)
            assert isinstance(getattr(moe, name), RTNQuantizedTensor)
            setattr(
                moe, name, nn.Parameter(getattr(moe, name).transpose(1, 2).contiguous(), requires_grad=False)
            )
        after = moe(x)
        assert (after - before).norm() < (0.3 if config.bits == 4 else 0.03) * before.norm()
        for name in ("w1", "w2", "w3"):
            flat = getattr(moe, name).transpose(1, 2).flatten(0, 1).contiguous()
            back = flat.unflatten(0, (experts, -1)).squeeze(dim=0).transpose(1, 2).contiguous()
            setattr(moe, name, nn.Parameter(back, requires_grad=False))
        assert torch.equal(moe(x), after)

    joined = LlamaModelsLlama4Experts(experts, dim, 2 * hidden, torch.float32, "meta")
    states = [moe.state_dict() for moe in models]
    joint = {name: torch.cat([s[name] for s in states], dim=-1) for name in ("w1", "w3")}
    if config.group_size == -1:  # w2's hidden dim is in_features
        with pytest.raises(ValueError, match="group_size=-1"):
            torch.cat([s["w2"] for s in states], dim=1)
        return
    joint["w2"] = torch.cat([s["w2"] for s in states], dim=1)
    joined.load_state_dict(joint, assign=True)
    torch.testing.assert_close(joined(x), models[0](x) + models[1](x), rtol=1e-4, atol=1e-2)


# ------------------------------------------------------ quantize_ and the flatten contract


@every_config
def test_quantize_is_torchaos_too(config):
    model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 32))
    dense = [p.detach().clone() for p in (model[0].weight, model[2].weight)]
    quantize_(model, config, filter_fn=lambda module, fqn: fqn == "0")
    assert isinstance(model[0].weight, TorchAOBaseTensor)
    assert torch.equal(
        model[0].weight, RTNQuantizedTensor.from_float(dense[0], config.bits, config.group_size)
    )
    assert type(model[2].weight) is nn.Parameter
    assert torch.equal(model[2].weight, dense[1])


def test_flatten_names_every_plane_and_attribute():
    w = RTNQuantizedTensor.from_float(torch.randn(2, 6, 100), 8, 64, "signed", torch.bfloat16).mT
    planes, attributes = w.__tensor_flatten__()
    assert planes == ["qdata", "scale"]
    assert attributes == (8, 64, "signed", 100, True, 1)
    back = RTNQuantizedTensor.__tensor_unflatten__(
        {p: getattr(w, p) for p in planes}, attributes, w.shape, w.stride()
    )
    assert (back.shape, back.stride(), back.dtype) == (w.shape, w.stride(), w.dtype)
    assert torch.equal(back, w)


def test_what_flatten_gives_is_kept_on_its_tensor_alone():
    w = RTNQuantizedTensor.from_float(torch.randn(4, 128), 4, 64)
    kept = w.__tensor_flatten__()
    assert w.__tensor_flatten__() is kept
    assert b"_flat" not in pickle.dumps(w)
    w.__tensor_flatten__()
    for other in (
        w[:, :64],
        w.mT,
        w.bfloat16(),
        nn.Parameter(w),
        copy.deepcopy(w.mT),
        copy.copy(w),
        pickle.loads(pickle.dumps(w)),
    ):
        attributes = other.__tensor_flatten__()[1]
        assert attributes is not kept[1]
        assert attributes == tuple(getattr(other, name) for name in other.tensor_attribute_names)


def test_contexts_compare_by_value():
    """Two layers of one shape must not compile twice."""

    def context(n, k, **kwargs):
        return RTNQuantizedTensor.from_float(torch.randn(n, k), **kwargs).__tensor_flatten__()[1]

    assert context(6, 100) == context(7, 100)
    assert hash(context(6, 100)) == hash(context(7, 100))
    assert context(6, 100) != context(6, 101)
    assert context(6, 100) != context(6, 100, bits=8)


del TorchAOBasicTestCase, TorchAOCompileTestCase  # else they would be collected with torchao's own tensor
