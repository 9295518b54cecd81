"""transformers' own doors: `from_pretrained` with our config in its `TorchAoConfig`, `save_pretrained`, and
what users do next."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_llama import tiny_llama, tiny_tokenizer
from torch import nn
from torchao.quantization import FqnToConfig
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TorchAoConfig, pipeline
from transformers.integrations.accelerate import compute_module_sizes, infer_auto_device_map
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from rtn_tensor import RTNQuantizedTensor, dequantize_, load, quantize_, rtn, rtn_int4, rtn_int8, save

IDS = torch.tensor([[5, 77, 130, 9, 201, 64]])
BITS = pytest.mark.parametrize("bits", [4, 8])
TIED = pytest.mark.parametrize("tied", [False, True])


@pytest.fixture
def folder(tmp_path):
    """A function that writes a float model."""

    def make(tied=False, dtype=torch.float32):
        tiny_llama(tied, dtype).save_pretrained(tmp_path / "float")
        return tmp_path / "float"

    return make


def read(path, config=None, **kwargs):
    """What a user of transformers writes; `kwargs` that TorchAoConfig knows go there."""
    names = ("modules_to_not_convert", "include_input_output_embeddings", "untie_embedding_weights")
    about = {name: kwargs.pop(name) for name in names if name in kwargs}
    if config is not None:
        kwargs["quantization_config"] = TorchAoConfig(config, **about)
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def but_the_ends(module, fqn):
    return isinstance(module, nn.Linear) and fqn != "lm_head"


def quantized(config, filter_fn=but_the_ends, tied=False, dtype=torch.float32):
    """The same model, quantized by us."""
    model = tiny_llama(tied, dtype)
    quantize_(model, config, None if isinstance(config, FqnToConfig) else filter_fn)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def generate(model, **kwargs):
    return model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, pad_token_id=0, **kwargs
    ).tolist()


def greedy(model):
    return generate(model, do_sample=False)


def is_tied(model):
    return model.lm_head.weight is model.model.embed_tokens.weight


def cast(model, dtype):
    """As `from_pretrained(dtype=...)` does: buffers stay what they are, and `model.to` would cast them."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def assert_same_weights(model, expected):
    names = [name for name, _ in expected.named_parameters(remove_duplicate=False)]
    assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == names
    for name in names:
        a, b = model.get_parameter(name), expected.get_parameter(name)
        assert (a.dtype, type(a)) == (b.dtype, type(b)), name
        assert torch.equal(a, b), name
    assert is_tied(model) == is_tied(expected)


def assert_same(model, expected):
    """Bit for bit the same parameters, logits and greedy tokens."""
    assert_same_weights(model, expected)
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert greedy(model) == greedy(expected)


# -------------------------------------------------------------------------- there and back


@BITS
@TIED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantized_on_the_fly(folder, bits, tied, dtype):
    model = read(folder(tied, dtype), rtn(bits, 64))
    assert type(model) is LlamaForCausalLM
    assert not model.training
    assert_same(model, quantized(rtn(bits, 64), tied=tied, dtype=dtype))


@BITS
@TIED
def test_saved_and_read_again(folder, tmp_path, bits, tied):
    model = read(folder(tied), rtn(bits, 64, "signed"))
    model.save_pretrained(tmp_path / "first")
    again = read(tmp_path / "first")
    assert_same(again, model)
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        assert_same(read(tmp_path / "first", rtn(bits, 64)), model)
    assert_same(load(tmp_path / "first"), model)
    again.save_pretrained(tmp_path / "second", save_original_format=False)
    assert_same(read(tmp_path / "second"), model)
    save(again, tmp_path / "third")
    assert_same(read(tmp_path / "third"), model)


def test_transformers_cannot_undo_what_it_read(folder, tmp_path):
    """Nor of torchao's own tensors, unless it is told not to; `save` needs no telling."""
    read(folder(), rtn_int4(64)).save_pretrained(tmp_path / "first")
    with pytest.raises(NotImplementedError):
        read(tmp_path / "first").save_pretrained(tmp_path / "second")


@TIED
def test_quantized_after_loading(folder, tmp_path, tied):
    """`quantize_`, which takes lm_head, too, and then transformers' own save_pretrained."""
    model = read(folder(tied))
    float_config = model.config.to_dict()
    quantize_(model, rtn_int4(64))
    before = logits(model)
    model.tie_weights()  # would put the float embedding into lm_head again
    assert isinstance(model.lm_head.weight, RTNQuantizedTensor)
    assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "quantized")
    again = read(tmp_path / "quantized")
    assert_same(again, model)
    assert greedy(again) == greedy(model)
    dequantize_(model)
    model.save_pretrained(tmp_path / "dequantized")
    assert torch.equal(logits(read(tmp_path / "dequantized")), logits(model))
    assert model.config.to_dict() == float_config | {"dtype": model.config.to_dict()["dtype"]}


def test_shards(folder, tmp_path):
    model = read(folder(), rtn_int4(64))
    model.save_pretrained(tmp_path / "quantized", max_shard_size="50KB")
    assert len(list((tmp_path / "quantized").glob("*.safetensors"))) > 1
    assert_same(read(tmp_path / "quantized"), model)


def test_names_of_the_config_on_disk(folder, tmp_path):
    read(folder(), rtn_int4(64)).save_pretrained(tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "torchao"
    assert config["quant_type"]["default"]["_type"] == "RTNInt4WeightConfig"


def test_a_config_of_before_the_classes_had_bits(folder, tmp_path):
    model = read(folder(), rtn_int8(64))
    model.save_pretrained(tmp_path / "quantized")
    file = tmp_path / "quantized" / "config.json"
    text = file.read_text()
    assert text.count("RTNInt8WeightConfig") == 1
    file.write_text(text.replace("RTNInt8WeightConfig", "RTNConfig"))
    assert_same(read(tmp_path / "quantized"), model)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_dtype_on_the_fly(folder, tmp_path, saved, dtype):
    expected = cast(tiny_llama(dtype=saved), dtype)
    quantize_(expected, rtn_int4(64), but_the_ends)
    model = read(folder(dtype=saved), rtn_int4(64), dtype=dtype)
    assert_same(model, expected)
    model.save_pretrained(tmp_path / "quantized")
    for asked in (None, "auto", dtype):
        assert_same(read(tmp_path / "quantized", dtype=asked), expected)


def test_without_our_import_it_is_an_error(folder, tmp_path):
    """transformers must not go on to random weights. (With the import, test_checkpoint has a fresh
    process.)"""
    read(folder(), rtn_int4(64)).save_pretrained(tmp_path / "quantized")
    program = (
        "import sys, transformers; print(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "quantized")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith(
        "ValueError: Failed to find class RTNInt4WeightConfig in any of the allowed modules: "
    )


# --------------------------------------------------------------------------- which weights


@TIED
def test_skipped_modules(folder, tmp_path, tied):
    """Names from the model's root, or patterns; a list takes the place of transformers' own, which is the
    ends."""
    skipped = ["lm_head", "model.layers.0", ".*k_proj"]
    model = read(folder(tied), rtn_int4(64), modules_to_not_convert=skipped)
    expected = quantized(
        rtn_int4(64),
        lambda m, fqn: but_the_ends(m, fqn) and "layers.0" not in fqn and "k_proj" not in fqn,
        tied,
    )
    assert_same(model, expected)
    model.save_pretrained(tmp_path / "quantized")
    assert_same(read(tmp_path / "quantized"), expected)
    assert_same(load(tmp_path / "quantized"), expected)


TABLES = {
    "patterns": {"re:.*q_proj": rtn_int8(32), "re:.*mlp.*": rtn_int4(-1, "signed")},
    "module": {"model.layers.0.mlp.up_proj": rtn_int4(32), "model.layers.1.self_attn.o_proj": rtn_int8(-1)},
    "parameter": {"model.layers.0.mlp.up_proj.weight": rtn_int4(32), "re:.*1.*o_proj.weight": rtn_int8(64)},
    "default": {
        "model.layers.0.mlp.up_proj": rtn_int8(32),
        "model.layers.1.mlp.down_proj": None,
        "lm_head": None,
        "_default": rtn_int4(64),
    },
}


# torchao's, at every FqnToConfig that has one.
@pytest.mark.filterwarnings("ignore:Config Deprecation. _default:UserWarning")
@TIED
@pytest.mark.parametrize("name", TABLES)
def test_fqn_to_config(folder, tmp_path, name, tied):
    expected = quantized(FqnToConfig(TABLES[name]), tied=tied)
    model = read(folder(tied), FqnToConfig(TABLES[name]))
    assert_same(model, expected)
    model.save_pretrained(tmp_path / "quantized")
    assert_same(read(tmp_path / "quantized"), expected)
    assert_same(load(tmp_path / "quantized"), expected)


@TIED
@pytest.mark.parametrize("ends", ["plain config", "table"])
def test_input_and_output_embeddings(folder, tmp_path, ends, tied):
    """transformers hands the embedding to torchao as it does any module, and only a table makes torchao look
    at an embedding. So of a plain config an untied lm_head alone is quantized, and of a tied model
    neither."""
    table = FqnToConfig({"re:.*_proj": rtn_int4(64), "model.embed_tokens": rtn_int8(), "lm_head": rtn_int8()})
    if ends == "table":
        config, expected = table, quantized(table, tied=tied)
    else:
        config = rtn_int4(64)
        expected = quantized(
            config, but_the_ends if tied else lambda module, fqn: isinstance(module, nn.Linear), tied
        )
    model = read(folder(tied), config, include_input_output_embeddings=True)
    assert_same(model, expected)
    model.save_pretrained(tmp_path / "quantized")
    assert_same(read(tmp_path / "quantized"), expected)
    assert_same(load(tmp_path / "quantized"), expected)


# ---------------------------------------------------------------------- memory and devices


def sizes(config):
    """What transformers takes the modules of a model to weigh before it reads it, and its quantizer."""
    with torch.device("meta"):
        model = tiny_llama()
    quantizer = TorchAoHfQuantizer(TorchAoConfig(config), pre_quantized=False)
    quantizer.preprocess_model(model)
    return compute_module_sizes(model, quantizer)[0], model, quantizer


@BITS
def test_transformers_knows_the_size(bits):
    weights = sum(w.numel() for name, w in tiny_llama().named_parameters() if "_proj" in name)
    report = quantize_(tiny_llama(), rtn(bits, 64), but_the_ends)
    buffers = sum(b.nbytes for b in tiny_llama().buffers())
    floats = sum(row.bytes_after for row in report.rows if row.bits is None) + buffers
    measured, _, quantizer = sizes(rtn(bits, 64))
    assert measured[""] == floats + weights * bits / 8
    # It leaves out the scales, and a tenth of the memory for them.
    assert (
        measured[""]
        < report.bytes_after + buffers
        < measured[""] / quantizer.adjust_max_memory({"cpu": 1})["cpu"]
    )


@BITS
def test_device_map_is_inferred_from_the_size(bits):
    """Memory for the int4 model, and not for the int8 one."""
    _, model, quantizer = sizes(rtn(bits, 64))
    memory = {"cpu": 1.1 * sizes(rtn_int4(64))[0][""] / 0.9, "disk": 10**9}
    found = infer_auto_device_map(
        model, quantizer.adjust_max_memory(memory), model._no_split_modules, hf_quantizer=quantizer
    )
    assert (found == {"": "cpu"}) == (bits == 4)
    assert set(found.values()) == ({"cpu"} if bits == 4 else {"cpu", "disk"})


@BITS
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(folder, tmp_path, bits, device_map):
    expected = quantized(rtn(bits, 64))
    model = read(folder(), rtn(bits, 64), device_map=device_map)
    assert_same(model, expected)
    model.save_pretrained(tmp_path / "quantized")
    assert_same(read(tmp_path / "quantized", device_map=device_map), expected)


# ---------------------------------------------------------------------- what users do next


@pytest.fixture
def model(folder):
    return read(folder(), rtn_int4(64))


def test_caches(model):
    expected = greedy(quantized(rtn_int4(64)))
    assert len(expected[0]) > IDS.shape[1] + 4
    for options in (
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
    ):
        assert generate(model, do_sample=False, **options) == expected


def test_sampling_and_beams(model):
    expected = quantized(rtn_int4(64))
    for options in (
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": False, "num_beams": 3},
    ):
        torch.manual_seed(0)
        found = generate(model, **options)
        torch.manual_seed(0)
        assert found == generate(expected, **options)
        assert found != greedy(model)


def test_pipeline(model):
    tokenizer = tiny_tokenizer()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (written,) = write("We the people", max_new_tokens=6, do_sample=False, return_full_text=False)
    ids = tokenizer("We the people", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[
        0, ids["input_ids"].shape[1] :
    ]
    assert written["generated_text"] == tokenizer.decode(out, skip_special_tokens=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_to_another_dtype(model, tmp_path, dtype):
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    assert model.to(dtype) is model
    assert {p.dtype for p in model.parameters()} == {dtype}
    after = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(after.qdata, before.qdata)
    assert torch.equal(after.scale, before.scale.to(dtype))
    assert model(IDS).logits.dtype == dtype
    model.save_pretrained(tmp_path / "quantized")
    assert_same_weights(read(tmp_path / "quantized"), model)


def test_another_dtype_of_a_quantized_folder(model, tmp_path):
    """transformers converts what is not quantized and leaves our scales as they are: an error at the first
    layer, and `to` mends it."""
    model.save_pretrained(tmp_path / "quantized")
    again = read(tmp_path / "quantized", dtype=torch.bfloat16)
    with pytest.raises(
        TypeError,
        match=r"x is torch.bfloat16 but the weight is torch.float32; use .* " r"weight.to\(torch.bfloat16\)",
    ):
        again(IDS)
    assert_same_weights(again.to(torch.bfloat16), model.to(torch.bfloat16))
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_half_is_refused_by_transformers(model, folder):
    with pytest.raises(ValueError, match=r"`.half\(\)` is not supported for quantized model"):
        model.half()
    assert load(folder(), rtn_int4(64)).half().dtype == torch.float16  # which transformers did not quantize


def test_compile(model):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.forward, backend=counter, fullgraph=True)
    with torch.no_grad():
        for ids in (IDS, IDS + 1):
            assert torch.equal(compiled(ids, use_cache=False).logits, model(ids).logits)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compile_with_inductor(model):
    with torch.no_grad():
        compiled = torch.compile(model.forward)(IDS, use_cache=False).logits
        torch.testing.assert_close(compiled, model(IDS).logits, rtol=1e-4, atol=1e-4)
