"""What `load` refuses, and leaves as it was."""

import json
import subprocess
import sys

import pytest
import torch
from expecttest import assert_expected_inline
from safetensors.torch import load_file, save_file
from test_load import make_mlp, on_meta
from tiny_llama import tiny_llama
from torch import nn

from rtn_tensor import load, quantize_, rtn_int4, rtn_int8, save
from rtn_tensor.formats import VERSION


def broken(tensors, **changes):
    return {name: t for name, t in (tensors | changes).items() if t is not None}


WRONG = {
    "missing": {"1.weight": None},
    "shape": {"1.weight": torch.zeros(160, 95, dtype=torch.bfloat16)},
    "unexpected": {"9.weight": torch.zeros(3)},
    "nan": {
        "1.weight": torch.zeros(160, 96, dtype=torch.bfloat16).index_fill(0, torch.tensor([159]), torch.nan)
    },
    "inf in a float weight": {"0.weight": torch.full((50, 96), torch.inf, dtype=torch.bfloat16)},
    "int": {"1.weight": torch.zeros(160, 96, dtype=torch.int8)},
    "fp8": {"3.weight": torch.zeros(33, 160, dtype=torch.float8_e4m3fn)},
}


def test_checkpoints_that_do_not_fit(tmp_path):
    tensors = make_mlp().state_dict()
    file = tmp_path / "model.safetensors"
    messages = []
    for name, change in WRONG.items():
        save_file(broken(tensors, **change), file)
        model = make_mlp()
        before = dict(model.named_parameters())
        with pytest.raises(ValueError) as caught:  # noqa: PT011  (the messages are pinned below)
            load(tmp_path, rtn_int4(32), model)
        messages.append(f"{name}: {caught.value}".replace(str(tmp_path), "FOLDER"))
        assert all(p is before[fqn] for fqn, p in model.named_parameters())  # as it was
    assert_expected_inline(
        "\n".join(messages),
        """\
missing: the checkpoint does not fit the model, and nothing was loaded:
  the checkpoint lacks 1.weight [160, 96]
shape: the checkpoint does not fit the model, and nothing was loaded:
  model.safetensors: 1.weight has shape [160, 95], the model's 1.weight [160, 96]
unexpected: the checkpoint does not fit the model, and nothing was loaded:
  model.safetensors: 9.weight has no place in the model
nan: FOLDER/model.safetensors: 1.weight holds NaN or inf; the checkpoint is damaged, copy or download it again
inf in a float weight: FOLDER/model.safetensors: 0.weight holds NaN or inf; the checkpoint is damaged, copy or download it again
int: FOLDER/model.safetensors: 1.weight is torch.int8; load takes torch.float32, torch.bfloat16, torch.float16
fp8: FOLDER/model.safetensors: 3.weight is torch.float8_e4m3fn; load takes torch.float32, torch.bfloat16, torch.float16""",
    )


def test_files_that_cannot_be_read(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model", max_shard_size="100KB")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for content in (b"", whole[:4], whole[:300], whole[:-1], b"x" * 100):
        shard.write_bytes(content)
        with pytest.raises(
            ValueError, match="is truncated or corrupt .*; copy or download it again"
        ) as caught:
            load(tmp_path / "model", rtn_int4())
        assert str(caught.value).startswith(str(shard))
    shard.unlink()
    with pytest.raises(
        FileNotFoundError, match=f"lacks {shard.name}, which model.safetensors.index.json names"
    ):
        load(tmp_path / "model", rtn_int4())
    (tmp_path / "bad.pt").write_bytes(whole)
    with pytest.raises(ValueError, match="bad.pt cannot be read .*; give a state_dict that torch.save wrote"):
        load(tmp_path / "bad.pt", model=on_meta())
    for path, why in ((tmp_path, "is not a model folder"), (tmp_path / "none", "holds no checkpoint")):
        with pytest.raises(FileNotFoundError, match=why):
            load(path, rtn_int4(), on_meta() if "none" in str(path) else None)


def test_already_quantized(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "float")
    save(load(tmp_path / "float", rtn_int4(32)), tmp_path / "model")
    with pytest.raises(
        ValueError, match="is quantized already; load it without a config, or give the float checkpoint"
    ):
        load(tmp_path / "model", rtn_int8())


def test_a_later_version_is_refused(tmp_path):
    model = make_mlp()
    quantize_(model, rtn_int4(32))
    save(model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    content = file.read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    assert json.loads(metadata["1.weight"])["_data"]["version"] == 1
    metadata["1.weight"] = metadata["1.weight"].replace('"version": 1', f'"version": {VERSION + 1}')
    save_file(tensors, file, metadata)
    why = f"the weight is of version {VERSION + 1} of the format, and this rtn-tensor reads up to {VERSION}; upgrade"
    with pytest.raises(ValueError, match=f"model.safetensors: 1.weight: {why}"):
        load(tmp_path / "model", model=on_meta())


def test_a_disk_that_is_full(tmp_path):
    """Files of 100 kB and no more: the file system's own error, and what stood there before."""
    make = "import rtn_tensor, resource, signal, torch; from torch import nn; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    program = f"""
{make}
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
small, large = nn.Linear(64, 64), nn.Linear(512, 512)
rtn_tensor.save(small, {str(tmp_path / "model")!r})
for _ in range(2):
    try:
        rtn_tensor.save(large, {str(tmp_path / "model")!r}, force=True)
    except OSError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("could not be written (") == 2
    assert done.stdout.count(f"'{tmp_path / 'model'}'") == 2
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert load(tmp_path / "model", model=nn.Linear(64, 64)).weight.shape == (64, 64)
