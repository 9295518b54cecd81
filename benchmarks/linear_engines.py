"""Linear layers with int4 weights in OpenVINO and ONNX Runtime, for `benchmarks.cpu_linear` to run in an
environment that has `openvino`, `onnxruntime` and `onnx`.

    python linear_engines.py NAME N K THREADS

Prints the engine's version, after a product that is compared with numpy's: in its error one sees whether the
engine rounds the activations to int8. Then, for each line "M FIRST" on its standard input, one number: the
median seconds of a few calls with M rows, on the weights from FIRST on.

Groups are of 128, symmetric. OpenVINO takes and gives bf16, ONNX Runtime fp32, as it has no bf16 here.
Neither binds threads to cores, as then they could not give way.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from bursts import burst, weights_past_cache

GROUP = 128
# The mean error over the mean product. bf16 gives 0.0014 to 0.0023, by how often it rounds; int8 in groups of
# 32 gives 0.0056, in groups of 128 0.0065.
LEAST_OF_INT8, MOST_OF_INT8 = 0.0035, 0.012


class Weight(NamedTuple):
    packed: np.ndarray  # [N, K / 2], unsigned 4-bit integers, the even column's in the low half
    scale: np.ndarray  # fp16 [N, K / 128]

    def integers(self) -> np.ndarray:
        """-8 to 7, `[N, K]`."""
        low, high = self.packed & 15, self.packed >> 4
        return np.stack([low, high], -1).reshape(len(self.packed), -1).astype(np.int8) - 8

    def product(self, x: np.ndarray) -> np.ndarray:
        return x @ (self.integers() * np.repeat(self.scale.astype(np.float32), GROUP, 1)).T


class Layers(NamedTuple):
    """An engine's, one a weight."""

    version: str
    bind: Callable[[np.ndarray], None]  # what all calls from now on multiply, fp32 that bf16 holds exactly
    calls: list[Callable[[], object]]
    output: Callable[[], np.ndarray]  # of the last layer's last call


def openvino(weights: list[Weight], threads: int, **options: object) -> Layers:
    import openvino as ov
    from openvino import opset13 as ops

    core = ov.Core()
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
        **options,
    }

    def request(weight: Weight) -> ov.InferRequest:
        n, groups = weight.scale.shape
        signed = weight.packed ^ 0x88  # from an offset of 8 to two's complement
        shape = [n, groups, GROUP]
        q = ops.constant(ov.Tensor(signed.reshape(-1), shape, ov.Type.i4), shared_memory=False)
        w = ops.multiply(ops.convert(q, "f16"), ops.constant(weight.scale[..., None]))
        w = ops.convert(ops.reshape(w, ops.constant([n, groups * GROUP]), False), "f32")
        x = ops.parameter([-1, groups * GROUP], ov.Type.bf16)
        y = ops.convert(ops.matmul(ops.convert(x, "f32"), w, False, True), "bf16")
        return core.compile_model(ov.Model([y], [x]), "CPU", options).create_infer_request()

    requests = [request(weight) for weight in weights]

    def bind(x: np.ndarray) -> None:
        tensor = ov.Tensor(ov.Type.bf16, list(x.shape))  # one of numpy's memory would not keep it
        tensor.data.view(np.uint16)[:] = x.view(np.uint32) >> 16
        for one in requests:
            one.set_input_tensor(tensor)

    def output() -> np.ndarray:
        data = requests[-1].get_output_tensor().data
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    calls = [partial(one.infer, share_outputs=True) for one in requests]
    return Layers(ov.__version__, bind, calls, output)


def onnx_runtime(weights: list[Weight], threads: int) -> Layers:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    # All layers share their threads. With threads of their own, those of the layer before would still spin.
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    n, groups = weights[0].scale.shape
    k = groups * GROUP
    node = helper.make_node(
        "MatMulNBits",
        ["x", "weight", "scale"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=4,
        block_size=GROUP,
        accuracy_level=4,  # int8 activations
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]

    def session(weight: Weight) -> onnxruntime.InferenceSession:
        planes = {
            "weight": weight.packed.reshape(n, groups, GROUP // 2),
            "scale": weight.scale.astype(np.float32).reshape(-1),
        }
        graph = helper.make_graph(
            [node],
            "linear",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", n])],
            [numpy_helper.from_array(plane, name) for name, plane in planes.items()],
        )
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    sessions = [session(weight) for weight in weights]
    bindings = [one.io_binding() for one in sessions]
    values = {}

    def bind(x: np.ndarray) -> None:
        values["x"] = onnxruntime.OrtValue.ortvalue_from_numpy(x)
        values["y"] = onnxruntime.OrtValue.ortvalue_from_numpy(np.empty((len(x), n), np.float32))
        for binding in bindings:
            binding.bind_ortvalue_input("x", values["x"])
            binding.bind_ortvalue_output("y", values["y"])

    calls = [
        partial(one.run_with_iobinding, binding) for one, binding in zip(sessions, bindings, strict=True)
    ]
    return Layers(onnxruntime.__version__, bind, calls, lambda: values["y"].numpy())


ENGINES = {
    "OpenVINO": openvino,
    "OpenVINO, int8 in groups of 128": partial(openvino, DYNAMIC_QUANTIZATION_GROUP_SIZE=128),
    "OpenVINO, bf16 activations": partial(
        openvino, DYNAMIC_QUANTIZATION_GROUP_SIZE=0, INFERENCE_PRECISION_HINT="bf16"
    ),
    "ONNX Runtime": onnx_runtime,
}


def activations(rng: np.random.Generator, m: int, k: int) -> np.ndarray:
    """fp32 that bf16 holds exactly."""
    return (rng.standard_normal((m, k), np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def check(name: str, layers: Layers, weight: Weight, x: np.ndarray) -> None:
    """Of the product with `weight`, the last."""
    layers.bind(x)
    layers.calls[-1]()
    exact = weight.product(x)
    error = np.abs(layers.output() - exact).mean() / np.abs(exact).mean()
    least, most = (0, LEAST_OF_INT8) if "bf16" in name else (LEAST_OF_INT8, MOST_OF_INT8)
    if "OpenVINO" in name and "amx_bf16" in Path("/proc/cpuinfo").read_text():
        least = 0  # there OpenVINO 2026.4 multiplies by AMX in bf16 by default, too
    if not least <= error < most:
        raise RuntimeError(
            f"{name} differs from the exact product by {error:.4f} of it, where its activations should make "
            f"that {least} to {most}. Leave it out, or mend benchmarks/linear_engines.py for this version"
        )


def main() -> None:
    name, *numbers = sys.argv[1:]
    n, k, threads = map(int, numbers)
    rng = np.random.default_rng(0)
    weights = [
        Weight(
            rng.integers(0, 256, (n, k // 2), np.uint8),
            rng.uniform(0.005, 0.015, (n, k // GROUP)).astype(np.float16),
        )
        for _ in range(weights_past_cache(n, k, 4))
    ]
    layers = ENGINES[name](weights, threads)
    check(name, layers, weights[-1], activations(rng, 8, k))
    del weights
    print(layers.version, flush=True)
    rows = 0
    for line in sys.stdin:
        m, first = map(int, line.split())
        if m != rows:
            layers.bind(activations(rng, m, k))
            for call in layers.calls:  # some engines prepare a layer when it first gets so many rows
                call()
            rows = m
        print(statistics.median(burst(layers.calls, first)), flush=True)


if __name__ == "__main__":
    main()
