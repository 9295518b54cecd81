"""Every experts module of the installed transformers, quantized, against its dequantized copy: with inputs
far past any clamp."""

import copy
import importlib
import inspect
import math
import pathlib

import pytest
import torch
import transformers
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Config, DeepseekV4Experts
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextConfig, Glm5NextTextExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
from transformers.models.hy_v4.modeling_hy_v4 import HYV4Config, HYV4Experts
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

from rtn_tensor import dequantize_, quantize_, rtn_int8
from rtn_tensor.integrations.transformers.experts import activation_of

SIZES = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4) | {
    "hidden_size": 64,
    "n_embd": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 96,
    "expert_ffn_hidden_size": 96,
    "moe_ffn_hidden_size": 96,
    "zero_expert_num": 0,
    "hidden_act": "silu",
}


def experts_classes():
    for path in sorted(pathlib.Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if "\n@use_experts_implementation" in path.read_text():
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            for kind in vars(module).values():
                if (
                    inspect.isclass(kind)
                    and hasattr(kind, "_apply_gate")
                    and kind.__module__ == module.__name__
                ):
                    yield module, kind


def configs(module):
    for kind in vars(module).values():
        if (
            inspect.isclass(kind)
            and issubclass(kind, transformers.PreTrainedConfig)
            and kind is not transformers.PreTrainedConfig
        ):
            config = kind()
            yield from (
                config,
                *(part for part in vars(config).values() if isinstance(part, transformers.PreTrainedConfig)),
            )


def experts(kind, config, **settings):
    """A module of `kind` with random weights, large enough that a few inputs reach what a gate does at its
    ends."""
    for name, value in (SIZES | settings).items():
        setattr(config, name, value)
    torch.manual_seed(0)
    module = kind(config).eval()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape)
    quantize_(module, rtn_int8(32))
    return module


def built(module, kind):
    problems = []
    for config in configs(module):
        try:
            return experts(kind, config)
        except (AttributeError, TypeError) as error:  # the config of another part of the model
            problems.append(repr(error))
    raise AssertionError(problems)


def worst(block, scales=(0.1, 1, 10, 100, 1000), dtype=torch.float32):
    """The largest relative error of `block` against a dequantized copy, run as transformers runs float
    experts one by one."""
    reference = copy.deepcopy(block)
    dequantize_(reference)
    reference.config = copy.copy(block.config)
    reference.config._experts_implementation = "eager"
    stacks = [w for w in block.parameters() if w.dim() == 3]
    hidden = stacks[0].shape[1 if block.is_transposed else 2]
    errors = []
    for scale in scales:
        x = (torch.randn(16, hidden) * scale).to(dtype)
        index = torch.stack([torch.randperm(4)[:2] for _ in range(16)])
        weights = torch.rand(16, 2).to(dtype)
        with torch.no_grad():
            got, expected = block(x, index, weights), reference(x, index, weights)
        errors.append(float((got - expected).abs().max() / expected.abs().max()))
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def test_every_experts_module():
    found = [(kind, worst(built(module, kind))) for module, kind in experts_classes()]
    assert len(found) >= 50  # 56 in transformers 5.19
    assert [(kind.__name__, error) for kind, error in found if not error < 1e-3] == []


@pytest.mark.parametrize("limit", [0.5, 7.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (DeepseekV4Experts, DeepseekV4Config),
        (Glm5NextTextExperts, Glm5NextTextConfig),
        (HYV4Experts, HYV4Config),
    ],
    ids=lambda value: value.__name__,
)
def test_a_clamp_is_applied_however_wide(kind, config, limit):
    block = experts(kind, config(), swiglu_limit=limit)
    assert activation_of(block) is None
    assert worst(block) < 1e-4
    assert worst(block.bfloat16(), (0.1, 1), torch.bfloat16) < 0.03


@pytest.mark.parametrize(
    ("limit", "alpha", "known"), [(7.0, 1.702, "gpt_oss"), (70.0, 1.702, None), (7.0, 1.0, None)]
)
def test_gpt_oss_with_other_settings(limit, alpha, known):
    block = experts(GptOssExperts, GptOssConfig(), swiglu_limit=limit, swiglu_alpha=alpha)
    assert activation_of(block) == known
    assert worst(block) < 1e-4


def test_what_changes_after_the_first_call_counts():
    block = experts(MixtralExperts, MixtralConfig())
    assert (activation_of(block), worst(block) < 1e-4) == ("silu", True)
    for act_fn, known in (
        (nn.GELU(), None),
        (nn.SiLU(), "silu"),
        (nn.ReLU(), None),
        (nn.functional.silu, "silu"),
    ):
        del block.act_fn
        block.act_fn = act_fn
        assert (activation_of(block), worst(block) < 1e-4) == (known, True), act_fn
    block = experts(DeepseekV4Experts, DeepseekV4Config())
    for limit in (1e6, 2.0):
        block.limit = limit
        assert worst(block) < 1e-4, limit


def test_an_activation_with_hooks_or_a_forward_of_its_own_is_called():
    block = experts(MixtralExperts, MixtralConfig())
    hook = block.act_fn.register_forward_hook(lambda module, args, output: output * 2)
    assert worst(block) < 1e-4
    hook.remove()
    block.act_fn.forward = torch.tanh
    assert worst(block) < 1e-4
    del block.act_fn.forward
    block._apply_gate = lambda h: h.chunk(2, -1)[1]
    x, index, weights = torch.randn(3, 64), torch.tensor([[0, 1], [2, 3], [1, 2]]), torch.rand(3, 2)
    with torch.no_grad():
        got = block(x, index, weights)
        block.config._experts_implementation = "grouped_mm"
        assert torch.allclose(got, block(x, index, weights), atol=1e-3)


def test_a_learned_activation_gets_its_gradient():
    block = experts(MixtralExperts, MixtralConfig())
    block.act_fn = nn.PReLU()
    x, index, weights = torch.randn(3, 64), torch.tensor([[0, 1], [2, 3], [1, 2]]), torch.rand(3, 2)
    block(x, index, weights).square().sum().backward()
    assert block.act_fn.weight.grad.abs() > 0


def test_compiled_code_follows_a_limit():
    torch._dynamo.reset()
    block = experts(DeepseekV4Experts, DeepseekV4Config())
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    x, index, weights = torch.randn(16, 64) * 50, torch.randint(0, 4, (16, 2)), torch.rand(16, 2)
    for limit in (10.0, 2.0):
        block.limit = limit
        with torch.no_grad():
            got, expected = compiled(x, index, weights), block(x, index, weights)
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
