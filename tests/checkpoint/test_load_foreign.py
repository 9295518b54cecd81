"""Folders of other libraries' formats, and of models with code of their own."""

import os
import subprocess
import sys
import tarfile

import pytest
import torch
from safetensors.torch import save_file
from test_load_folders import configured, more
from tiny_llama import tiny_llama
from torch import nn

from rtn_tensor import RTNQuantizedTensor, load, rtn_int4, save
from rtn_tensor.cli import main


@pytest.fixture
def folder(tmp_path):
    model = tiny_llama(layers=1)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ------------------------------------------------------------------------- others' formats


@pytest.mark.parametrize("nothing", [None, {}])
def test_no_quantization_after_all(folder, nothing):
    configured(folder, quantization_config=nothing)
    model = load(folder, rtn_int4(32))
    assert not hasattr(load(folder).config, "quantization_config")
    save(model, folder.with_name("out"))
    assert isinstance(load(folder.with_name("out")).model.layers[0].mlp.up_proj.weight, RTNQuantizedTensor)
    assert main(["quantize", str(folder), str(folder.with_name("command"))]) == 0


METHODS = {
    "hqq": ({"quant_method": "hqq", "quant_config": {}}, "HQQ"),
    "quanto": ({"quant_method": "quanto"}, "quanto"),
    "something new": ({"quant_method": "vapour"}, "vapour"),
    "nothing": ({"bits": 4}, "None"),
    "MLX, which gives itself no name": ({"group_size": 64, "bits": 4, "mode": "affine"}, "MLX"),
}


@pytest.mark.parametrize(("config", "kind"), METHODS.values(), ids=METHODS)
def test_other_libraries_by_their_config(folder, config, kind):
    for place in ("quantization_config", "compression_config"):
        configured(folder, **{"quantization_config": ..., "compression_config": ..., place: config})
        for make in (None, lambda: tiny_llama(layers=1)):
            with pytest.raises(ValueError, match="which load does not read; give the float model") as caught:
                load(folder, model=make)
            assert str(caught.value).startswith(
                f"{folder / 'config.json'} ({place}): the weights are quantized by {kind}, which"
            )


LIES = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8 with a scale for each block"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 64}, "AWQ"),
    "mxfp4": ({"quant_method": "mxfp4"}, "MXFP4"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "bitsandbytes of old": ({"load_in_8bit": True}, "bitsandbytes"),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "NVIDIA's ModelOpt"),
}


@pytest.mark.parametrize(("config", "kind"), LIES.values(), ids=LIES)
def test_a_config_that_is_not_of_the_weights(folder, config, kind):
    for place in ("quantization_config", "compression_config"):
        configured(folder, **{"quantization_config": ..., "compression_config": ..., place: config})
        for make in (None, lambda: tiny_llama(layers=1)):
            with pytest.raises(
                ValueError, match="and the files hold none that is; remove that entry"
            ) as caught:
                load(folder, model=make)
            assert str(caught.value).startswith(
                f"{folder / 'config.json'} ({place}): the weights are said to be quantized by {kind}, and"
            )


NAMES = {
    "GPTQ or AWQ": ["qweight", "qzeros", "scales", "g_idx"],
    "fp8 with a scale for each block": ["weight", "weight_scale_inv"],
    "compressed-tensors": ["weight_packed", "weight_scale", "weight_shape"],
    "HQQ": ["W_q", "meta"],
    "MLX": ["weight", "scales", "biases"],
}


@pytest.mark.parametrize(("kind", "names"), NAMES.items())
def test_other_libraries_by_their_tensors(tmp_path, kind, names):
    """Where no config says it, as beside a module that is not transformers'."""
    save_file({f"0.{name}": torch.ones(2) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"quantized by {kind}, which load does not read"):
        load(tmp_path, model=lambda: nn.Sequential(nn.Linear(4, 4, bias=False)))


@pytest.mark.parametrize("end", ["weight_scale_inv", "input_scale", "qzeros", "weight_packed"])
def test_other_libraries_by_tensors_that_the_model_has_no_place_for(folder, end):
    """All that it has a place for is there; without its scales it would be taken for plain numbers."""
    more(folder, **{f"model.layers.0.mlp.up_proj.{end}": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=rf"as its model\S+{end} says\): the weights are quantized by"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "kind"),
    [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ"), ("hf_quant_config.json", "Model")],
)
def test_other_libraries_by_their_files(tmp_path, file, kind):
    save_file({"0.packed": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match=kind):
        load(tmp_path, model=lambda: nn.Sequential(nn.Linear(4, 4, bias=False)))


def test_other_libraries_in_torch_files(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from torchao.quantization import quantize_ as torchao_quantize_

    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    torchao_quantize_(model, Int8WeightOnlyConfig(version=2))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(
        ValueError,
        match="model.pt: 0.weight is an Int8Tensor; load takes plain tensors, and those that "
        "rtn-tensor quantized",
    ):
        load(tmp_path / "model.pt", model=lambda: nn.Sequential(nn.Linear(64, 64, bias=False)))


# -------------------------------------------------------------------------- code of others


CODE = 'import pathlib\npathlib.Path(__file__).with_name("ran").touch()\n'


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mine", "architectures": ["MineForCausalLM"]},
        {"architectures": ["MineForCausalLM"]},
        {"model_type": "mine"},
        {"attn_implementation": "somebody/kernel"},
    ],
)
def test_code_in_a_folder_is_never_run(folder, changes):
    """Nor is anybody asked, who might not be there."""
    configured(
        folder,
        auto_map={"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"},
        **changes,
    )
    (folder / "mine.py").write_text(CODE)
    program = f"from rtn_tensor import load\ntry:\n    load({str(folder)!r})\nexcept ValueError as error:\n    print('said:', error)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        input="y\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith(f"said: {folder / 'config.json'}: "), done
    assert "y/N" not in done.stdout
    assert not (folder / "ran").exists()


def test_code_that_is_not_needed(folder):
    configured(
        folder, auto_map={"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    )
    (folder / "mine.py").write_text(CODE)
    load(folder)
    assert not (folder / "ran").exists()


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_an_unsafe_pickle(folder, zipped, monkeypatch):
    monkeypatch.chdir(folder)
    torch.save(
        {"a": torch.ones(2), "b": Evil()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped
    )
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError,
        match=r"pytorch_model.bin holds more than tensors \(posix.system\), and to read that "
        r"could run any code",
    ) as caught:
        load(folder)
    assert "weights_only" not in str(caught.value)
    assert not (folder / "ran").exists()


# ------------------------------------------------------------------- files that are no such


def torchscript(file):
    torch.jit.script(nn.Linear(2, 2)).save(file)


def tar(file):
    tarfile.open(file, "w").close()


UNREADABLE = {
    "empty": (lambda file: file.write_bytes(b""), "it is empty"),
    "text": (lambda file: file.write_bytes(b"<html>404</html>"), ""),
    "a pointer of Git LFS": (
        lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "",
    ),
    "a zip that is cut off": (lambda file: file.write_bytes(b"PK\3\4garbage"), "PytorchStreamReader failed"),
    "tar": (tar, "Cannot use ``weights_only=True`` with files saved in the legacy .tar format"),
    "TorchScript": (torchscript, "Cannot use ``weights_only=True`` with TorchScript archives"),
}


@pytest.mark.parametrize(("make", "why"), UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torch_files_that_cannot_be_read(folder, make, why):
    """With the file's name and a reason; what torch goes on to advise would run whatever it holds."""
    (folder / "model.safetensors").unlink()
    make(file := folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="give a state_dict that torch.save wrote") as caught:
        load(folder)
    assert str(caught.value).startswith(f"{file} cannot be read ({why}")
    assert "()" not in str(caught.value)
    assert "`weights_only` set to `False`" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"garbage", b"GGUF\3\0\0\0" + b"\xff" * 50, None])
@pytest.mark.filterwarnings("ignore")
def test_gguf_files_that_cannot_be_read(tmp_path, content):
    file = tmp_path / "x.gguf"
    file.mkdir() if content is None else file.write_bytes(content)
    why = "is a folder and no regular file" if content is None else "is truncated or corrupt"
    with pytest.raises(ValueError, match=rf"^{file} {why}.*(or replace it|download it again)$"):
        load(file)
