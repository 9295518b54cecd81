"""accelerate over quantized weights: offloading, dispatching, parameters that it makes anew, and what it
refuses."""

import pytest
import torch
from tiny_llama import tiny_llama
from torch import nn

pytest.importorskip("accelerate")

import accelerate
from accelerate.hooks import (
    AlignDevicesHook,
    add_hook_to_module,
    attach_align_device_hook,
    remove_hook_from_module,
)
from accelerate.utils import align_module_device, set_module_tensor_to_device

from rtn_tensor import RTNQuantizedTensor, quantize_, rtn

IDS = torch.tensor([[5, 77, 130, 9, 201, 64]])
UP = "model.layers.0.mlp.up_proj.weight"
PARTS = (
    "model.layers.0",
    "model.layers.1",
    "model.embed_tokens",
    "model.norm",
    "lm_head",
    "model.rotary_emb",
)
WITH_DISK = dict.fromkeys(PARTS, "cpu") | {"model.layers.0": "disk"}


@pytest.fixture
def model():
    return quantized(tiny_llama())


@pytest.fixture
def expected(model):
    return logits(model)


def quantized(model, config=None, everything=False):
    kinds = nn.Linear | nn.Embedding if everything else nn.Linear
    quantize_(
        model,
        config or rtn(4, 32),
        lambda module, fqn: isinstance(module, kinds) and (everything or fqn != "lm_head"),
    )
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def weight(model, name=UP):
    return model.get_parameter(name)


def assert_works(model, expected):
    """Twice: what the first call brought is away again before the second."""
    for _ in range(2):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------ offloading


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_cpu_offload(model, expected, offload_buffers):
    accelerate.cpu_offload(model, "cpu", offload_buffers=offload_buffers)
    assert all(p.is_meta for p in model.parameters())
    assert isinstance(weight(model), RTNQuantizedTensor)
    assert_works(model, expected)


def test_cpu_offload_executes_on_meta(model):
    accelerate.cpu_offload(model, "meta")
    assert model(IDS.to("meta")).logits.is_meta


def test_offload_of_tied_weights():
    """accelerate tells tied weights by `data_ptr()`: were it 0 for each, the tied one would be taken for all
    of them."""
    model = quantized(tiny_llama(tied=True), everything=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = logits(model)
    tied = {model.lm_head.weight.data_ptr(): {}}  # as dispatch_model has it where the main device is a GPU
    weights = dict(model.state_dict(keep_vars=True))
    attach_align_device_hook(
        model, execution_device="cpu", offload=True, weights_map=weights, tied_params_map=tied
    )
    assert_works(model, expected)


def test_pointers_are_of_their_own(model):
    pointers = [w.data_ptr() for w in model.parameters() if isinstance(w, RTNQuantizedTensor)]
    assert len({*pointers}) == len(pointers) == 14
    assert weight(model).data_ptr() == weight(model).detach().data_ptr()
    assert weight(model).to("meta").data_ptr() == 0


def test_hook_offloads_and_is_removed():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32), torch.randn(2, 64)
    quantize_(layer, rtn(4, 32))
    before, y = layer.weight, layer(x)
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", offload=True, io_same_device=True))
    assert layer.weight.is_meta
    assert torch.equal(layer(x), y)
    with align_module_device(layer):
        assert torch.equal(layer.weight, before)
    remove_hook_from_module(layer)
    assert torch.equal(layer.weight, before)
    assert isinstance(layer.weight, nn.Parameter)


def test_disk_is_refused_and_nothing_changes(model, expected, tmp_path):
    with pytest.raises(
        TypeError, match=r"q_proj.weight: a quantized weight is no numpy array .*offload to " r"the CPU"
    ):
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    with pytest.raises(
        TypeError, match=r"q_proj.weight: a quantized weight is no numpy array .*offload to " r"the CPU"
    ):
        accelerate.dispatch_model(model, WITH_DISK, main_device="cpu", offload_dir=tmp_path)
    assert_works(model, expected)
    with pytest.raises(
        TypeError,
        match=r"q_proj.weight: a quantized weight has no elements to view as "
        r"torch.int16 .*offload to the CPU",
    ):
        accelerate.disk_offload(model.bfloat16(), tmp_path, execution_device="cpu")


def test_dispatch_on_the_cpu(model, expected):
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert_works(model, expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_model_trains_while_a_layer_is_offloaded(model):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    accelerate.cpu_offload(model.get_base_model().model.layers[0].mlp, "cpu")
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_cpu_offload_with_hook(model, expected):
    model, hook = accelerate.cpu_offload_with_hook(model, "cpu")
    assert_works(model, expected)
    hook.offload()
    assert_works(model, expected)


# -------------------------------------------------------------------- parameters made anew


def test_a_weight_goes_to_meta_and_comes_back(model, expected):
    w = weight(model)
    w.weight_loader = print
    set_module_tensor_to_device(model, UP, "meta")
    assert weight(model).is_meta
    set_module_tensor_to_device(model, UP, "cpu", value=w)
    new = weight(model)
    assert isinstance(new, RTNQuantizedTensor)
    assert isinstance(new, nn.Parameter)
    assert new.weight_loader is print
    assert new.fqn == UP
    assert_works(model, expected)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_quantized_weight_into_a_float_model(model, expected, device):
    plain = tiny_llama().to(device)
    for name, p in model.named_parameters():
        set_module_tensor_to_device(plain, name, "cpu", value=p)
    plain.model.rotary_emb = model.model.rotary_emb
    assert_works(plain, expected)
    assert not weight(plain).requires_grad


def test_another_dtype(model):
    set_module_tensor_to_device(model, UP, "cpu", value=weight(model), dtype=torch.bfloat16)
    assert weight(model).dtype == torch.bfloat16


def test_a_float_tensor_names_no_format(model, expected):
    with pytest.raises(
        TypeError,
        match=r"float tensor of shape \(160, 96\)\) names no format; use " r"RTNQuantizedTensor.from_float",
    ):
        set_module_tensor_to_device(model, UP, "cpu", value=torch.zeros(160, 96))
    assert_works(model, expected)


@pytest.mark.parametrize("turned", [False, True])
def test_called_like_a_parameter(turned):
    w = RTNQuantizedTensor.from_float(torch.randn(40, 100), 8, 32, "signed")
    w = nn.Parameter(w.mT if turned else w, requires_grad=False)
    w.hung_on = "it"
    for requires_grad in (False, True):
        new = type(w)(w.to("cpu", copy=True), requires_grad=requires_grad, **vars(w))
        assert isinstance(new, nn.Parameter)
        assert torch.equal(new, w)
        assert new.hung_on == "it"
        assert not new.requires_grad
        assert new.qdata.data_ptr() != w.qdata.data_ptr()  # of the tensor that is given, not of the keywords
    alias = type(w)(w, requires_grad=False)
    assert alias.qdata.data_ptr() == w.qdata.data_ptr()
    fresh = torch.randn(w.shape)
    new, written = type(w)(fresh, requires_grad=False, **vars(w)), w.clone()
    written.copy_(fresh)
    assert torch.equal(new, written)
    assert type(w)(w.qdata, w.scale, 8, 32, "signed", 100, requires_grad=True).shape == (40, 100)
    for wrong in (torch.zeros(3, 4), 3):
        with pytest.raises(TypeError, match="names no format"):
            type(w)(wrong, requires_grad=False)


def test_init_empty_weights(model):
    with accelerate.init_empty_weights():
        copy = nn.Linear(96, 160)
        copy.weight = weight(model)
    assert copy.weight.is_meta
    assert isinstance(copy.weight, RTNQuantizedTensor)
    assert (copy.weight.bits, copy.weight.shape) == (4, (160, 96))


# ----------------------------------------------------------------------------- checkpoints


@pytest.fixture
def file(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    return str(tmp_path / "pytorch_model.bin")


def test_load_checkpoint_in_model(model, expected, file):
    other = quantized(tiny_llama(seed=1))
    accelerate.load_checkpoint_in_model(other, file)
    assert_works(other, expected)


def test_load_checkpoint_in_model_of_a_device_map(model, expected, file):
    other = quantized(tiny_llama(seed=1)).to("meta")
    accelerate.load_checkpoint_in_model(other, file, device_map={"": "cpu"})
    other.model.rotary_emb = model.model.rotary_emb
    assert_works(other, expected)


def test_load_a_float_checkpoint_quantizes(file, tmp_path, expected):
    torch.save(tiny_llama().state_dict(), file)
    other = quantized(tiny_llama(seed=1))
    accelerate.load_checkpoint_in_model(other, file)
    assert_works(other, expected)


def test_load_checkpoint_to_disk_is_refused(file, tmp_path):
    other = quantized(tiny_llama(seed=1)).to("meta")
    with pytest.raises(TypeError, match="offload to the CPU"):
        accelerate.load_checkpoint_and_dispatch(
            other, file, device_map=WITH_DISK, offload_folder=tmp_path / "offload"
        )


# ----------------------------------------------------------------------------- Accelerator


def test_accelerator(model, expected, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    assert_works(prepared, expected)
    assert isinstance(accelerator.get_state_dict(prepared)[UP], RTNQuantizedTensor)
    accelerator.save_state(tmp_path, safe_serialization=False)
    weight(model).copy_(torch.zeros(160, 96))
    accelerator.load_state(tmp_path)
    assert_works(prepared, expected)
    assert torch.equal(logits(accelerator.unwrap_model(prepared)), expected)
