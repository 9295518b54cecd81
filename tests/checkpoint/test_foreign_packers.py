"""The planes that other libraries' own code packs, where it is installed."""

import json

import foreign_formats as made
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rtn_tensor import load

helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "k", "group_size"), [(64, 96, 32), (48, 160, 64), (72, 100, -1)])
def test_compressed_tensors(tmp_path, bits, symmetric, n, k, group_size):
    """By its `pack_to_int32`, rows and zero points; K and N that are no whole words, too."""
    u, scale, zero, _, w = made.integers(n, k, bits, group_size, symmetric)
    q, zero = (u - 2 ** (bits - 1)).to(torch.int8), (zero - 2 ** (bits - 1)).to(torch.int8)
    state = {
        "0.weight_packed": helpers.pack_to_int32(q, bits),
        "0.weight_scale": scale,
        "0.weight_shape": torch.tensor([n, k]),
    }
    if not symmetric:
        state["0.weight_zero_point"] = helpers.pack_to_int32(zero, bits, packed_dim=0).contiguous()
    save_file(state, tmp_path / "model.safetensors")
    config = made.ct_config(
        bits=bits, group_size=None if group_size == -1 else group_size, symmetric=symmetric
    )
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    loaded = load(tmp_path, model=nn.Sequential(nn.Linear(k, n, bias=False, dtype=torch.bfloat16)))
    assert (loaded[0].weight.zero is None) == symmetric
    assert torch.equal(loaded[0].weight.dequantize(torch.float32), w)
