"""`load` into sharded models: each rank reads its own part."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from foreign_formats import gptq, gptq_config
from ranks import Cases
from safetensors.torch import save_file
from sharded_models import layers, mlp, parallel, quantized, same, sharded, x_of
from torch.distributed.device_mesh import init_device_mesh

from rtn_tensor import RTNQuantizedTensor, load, rtn_int4, save
from rtn_tensor.checkpoint import fill

case = Cases(2, 3)

KINDS = [
    (lambda: layers(64, 97, 33, 5), sharded),
    (mlp, lambda model: parallel(model, init_device_mesh("cpu", (dist.get_world_size(),)))),
]


def written(model, path):
    if dist.get_rank() == 0:
        save(model, path, force=True)
    dist.barrier()
    return path


@case
def of_quantized_files(ranks, folder):
    for make, shard in KINDS:
        whole = quantized(make())
        model = load(written(whole, f"{folder}/q"), model=shard(quantized(make().to("meta"))))
        local = next(model.parameters()).to_local()
        assert isinstance(local, RTNQuantizedTensor)
        assert (
            local.qdata.nbytes <= -(-whole[0].weight.qdata.nbytes // ranks) + 64 if shard is sharded else True
        )
        same(model(x_of(64)), whole(x_of(64)))
        dist.barrier()


@case
def of_float_files(ranks, folder):
    """Quantized as they are read, and on meta until then; every rank reads about its share."""
    read = []
    copy = fill._copy
    fill._copy = lambda piece, rows, to: (read.append(rows.nbytes), copy(piece, rows, to))
    try:
        for make, shard in KINDS:
            plain = make()
            total = sum(p.nbytes for p in plain.parameters())
            read.clear()
            model = load(
                written(plain, f"{folder}/f"), rtn_int4(group_size=32), model=shard(make().to("meta"))
            )
            assert isinstance(next(model.parameters()).to_local(), RTNQuantizedTensor)
            assert total / ranks / 2 < sum(read) < total / ranks * 1.2
            same(model(x_of(64)), quantized(make())(x_of(64)))
            dist.barrier()
            # And as floats.
            model = load(f"{folder}/f", model=shard(make().to("meta")))
            same(model(x_of(64)), plain(x_of(64)))
            dist.barrier()
    finally:
        fill._copy = copy


@case
def unfit(ranks, folder):
    mesh = init_device_mesh("cpu", (ranks,))
    path = written(quantized(mlp(48 * ranks)), f"{folder}/narrow")
    model = parallel(mlp(48 * ranks).to("meta"), mesh)
    before = list(model.parameters())
    # Of three ranks the last one's part would fit, and it raises, too.
    message = r"down.weight cannot slice columns \d+:\d+; with bits=4 and group_size=32 cuts must be multiples of 32|another rank failed"
    with pytest.raises((ValueError, RuntimeError), match=message):
        load(path, model=model)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    model = sharded(quantized(layers(64, 97, 48)))
    model(x_of(64))
    with pytest.raises(
        ValueError,
        match="the model has run under fully_shard, which keeps its parameters; do this before the first",
    ):
        load(path, model=model)


@case
def of_other_libraries(ranks, folder):
    """GPTQ's integers, zeros and float16 scales, in a model of another dtype: each rank keeps its own part."""
    path = Path(folder) / "gptq"
    for make, shard in ((lambda: layers(64, 96, 64), sharded), KINDS[1]):
        plain = make()
        if dist.get_rank() == 0:
            state = dict(plain.state_dict())
            torch.manual_seed(5)
            for name in [name for name in state if name.endswith("weight")]:
                planes, _ = gptq(*state.pop(name).shape, symmetric=False)
                state |= {f"{name.removesuffix('weight')}{end}": plane for end, plane in planes.items()}
            path.mkdir(exist_ok=True)
            save_file(state, path / "model.safetensors")
            (path / "config.json").write_text(json.dumps({"quantization_config": gptq_config(sym=False)}))
        dist.barrier()
        whole = load(path, model=make())
        model = load(path, model=shard(make().to("meta")))
        for w, of_all in zip(model.parameters(), whole.parameters(), strict=True):
            local = w.to_local() if hasattr(w, "to_local") else w
            if isinstance(of_all, RTNQuantizedTensor):
                assert isinstance(local, RTNQuantizedTensor)
                assert (local.dtype, local.scale.dtype) == (torch.float32, torch.float16)
                assert local.zero is not None
        for _ in range(2):
            same(model(x_of(64)), whole(x_of(64)))
        model = shard(make().to("meta"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            load(path, rtn_int4(32), model)
            due = load(path, rtn_int4(32), make())
        same(model(x_of(64)), due(x_of(64)))
        dist.barrier()
