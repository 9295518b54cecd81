"""Fresh weights for a running engine, again and again, as reinforcement learning gives them."""

import ctypes
import gc
import sys
from dataclasses import dataclass

import pytest
import torch
from engine import ROUNDING, difference, engine, greedy, memory, rtn
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torchao.quantization import FqnToConfig
from vllm.compilation.counter import compilation_counter
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm_models import other, places, reference

from rtn_tensor import rtn_int4, rtn_int8

CHUNKS = 3  # a trainer sends a model in pieces


@dataclass
class Nothing(WeightTransferInitInfo):
    pass


@dataclass
class Named(WeightTransferUpdateInfo):
    names: list[str]


class InProcess(WeightTransferEngine[Nothing, Named]):
    """What vLLM's engines for NCCL and CUDA's IPC do, which need GPUs, with weights of this process."""

    init_info_cls, update_info_cls = Nothing, Named
    sent: dict[str, torch.Tensor] = {}

    def init_transfer_engine(self, init_info):
        pass

    def start_weight_update(self):
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info):
        self.model.load_weights([(name, self.sent[name].clone()) for name in update_info.names])

    def finish_weight_update(self):
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self):
        pass


WeightTransferEngineFactory.register_engine("in_process", InProcess)


def weights_of(path):
    return load_file(path / "model.safetensors")


def transfer(llm, sent):
    InProcess.sent = sent
    llm.start_weight_update()
    for part in range(CHUNKS):
        llm.update_weights({"update_info": {"names": list(sent)[part::CHUNKS]}})
    llm.finish_weight_update()


def settled_memory() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return memory()


def compilations() -> tuple:
    stats = counters["stats"]
    return stats["unique_graphs"], stats["calls_captured"], compilation_counter.num_backend_compilations


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory")
def test_fifty_refreshes(folder, tmp_path):
    """By turns from a folder, from an iterator of tensors, and by vLLM's weight transfer in pieces: the outputs
    are those of the weights that came last, in the same memory, of which no more is taken, by the same compiled
    model."""
    paths = [folder("qwen3_moe"), other(folder("qwen3_moe"), tmp_path / "other")]
    sent = [weights_of(path) for path in paths]

    def refresh(llm, i):
        if i % 5 < 2:
            transfer(llm, sent[i % 2])
        elif i % 5 < 4:
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(sent[i % 2].items())})
        else:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(paths[i % 2])})
        llm.reset_prefix_cache()

    options = rtn(bits=4, group_size=64)
    with engine(
        paths[0], enforce_eager=False, weight_transfer_config={"backend": "in_process"}, **options
    ) as llm:
        llm.init_weight_transfer_engine({"init_info": {}})
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            greedy(llm, [[7, 8, 9]], new=2)
        first, where, compiled, taken = greedy(llm), places(llm), compilations(), []
        by_weights: list = [first, None]
        for i in range(50):
            refresh(llm, i)
            generated = greedy(llm)
            if by_weights[i % 2] is None:
                by_weights[i % 2] = generated
            assert generated == by_weights[i % 2]
            taken.append(settled_memory())
        assert where == places(llm)
    assert compilations() == compiled
    counts = {event.key: event.count for event in profile.key_averages()}
    assert min(counts.get("rtn::linear", 0), counts.get("rtn::routed", 0)) >= 2 * 4
    assert max(taken[10:]) - max(taken[5:10]) < 8 * 2**20  # the float weights are 8 MB, the planes 1.5
    assert by_weights[0] != by_weights[1]
    for path, generated in zip(paths, by_weights, strict=True):
        assert difference(reference(path, rtn_int4(64, "absmax")), generated) < ROUNDING["float32"]


def test_stacked_experts(folder, tmp_path):
    """GPT-OSS's own code would copy those of a float folder past what vLLM reloads by."""
    paths = [folder("gpt_oss"), other(folder("gpt_oss"), tmp_path / "other")]
    with engine(paths[0], **rtn(bits=4, group_size=64)) as llm:
        found, where = [greedy(llm)], places(llm)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(paths[1])})
        llm.reset_prefix_cache()
        found.append(greedy(llm))
        assert where == places(llm)
    for path, generated in zip(paths, found, strict=True):
        assert difference(reference(path, rtn_int4(64, "absmax")), generated) < ROUNDING["float32"]


def test_weights_loaded_without_any_preparation(folder, tmp_path):
    """As some trainers do, by `model.load_weights` alone: into the quantized weights in their place. On a CPU
    vLLM packs the float ones for its kernels, where nothing reaches them, so that all are quantized here."""
    paths = [folder("qwen3_moe"), other(folder("qwen3_moe"), tmp_path / "other")]
    whole = ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    rules = [[name, {"bits": 8, "group_size": 128}] for name in whole]
    config = FqnToConfig(
        {
            "lm_head": rtn_int8(128),
            r"re:.*\.mlp\.gate\.weight": rtn_int8(128),
            r"re:.*\.layers\..*_proj": rtn_int4(64, "absmax"),
        }
    )
    with engine(paths[0], **rtn(bits=4, group_size=64, rules=rules)) as llm:
        where, found = places(llm), []
        for i in range(1, 5):
            fresh = weights_of(paths[i % 2])
            llm.apply_model(lambda model, fresh=fresh: model.load_weights(iter(fresh.items())))
            llm.reset_prefix_cache()
            found.append(greedy(llm))
        assert where == places(llm)
    assert found[2:] == found[:2]
    for path, generated in zip(reversed(paths), found, strict=False):
        assert difference(reference(path, config), generated) < ROUNDING["float32"]
