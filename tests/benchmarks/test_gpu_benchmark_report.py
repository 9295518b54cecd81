"""What benchmarks/gpu.py reports, draws and keeps of measurements."""

import json

import pytest
from expecttest import assert_expected_inline
from test_gpu_benchmark import job, linear_rows

from benchmarks import gpu, gpu_peers, gpu_report, pictures
from benchmarks.gpu_peers import CUBLAS, GROUPED_MM


def some_results():
    results = gpu.no_results()
    results["machine"] = {
        "gpu": "NVIDIA T800",
        "driver": "580.1",
        "cuda": "13.0",
        "versions": {"torch": "2.11.0", "vllm": None},
    }
    results["ceilings"] = {"copy_bytes_per_s": 3e12, "matmul_flop_per_s": 8e14}
    results["correctness"] |= {"passed": 1234, "skipped": 2}
    names = [CUBLAS, "rtn int4 g128", "rtn int8 g128", "humming int4 g128"]
    results["linear"] = linear_rows(8192, 8192, names) + linear_rows(6144, 4096, names[:3], [1, 64])
    results["linear"].append(
        {"N": 8192, "K": 8192, "kernel": "mslk int4 g128", "error": "OSError: mslk.so: undefined symbol"}
    )
    for kernel, what, t, ratio in (
        (GROUPED_MM, "layer", 1, 1.0),
        ("rtn int4 g128", "layer", 1, 2.5),
        (GROUPED_MM, "layer, sorted before", 1, 1.0),
        ("rtn int4 g128", "layer, sorted before", 1, 2.75),
        (GROUPED_MM, "layer", 64, 1.0),
        ("rtn int4 g128", "layer", 64, 1.5),
    ):
        time = {"seconds": 1e-4 / ratio, "over_grouped_mm": ratio}
        results["moe"].append(
            {
                "model": "Mixtral 8x7B",
                "tokens": t,
                "kernel": kernel,
                "what": what,
                "graph": time,
                "do_bench": time,
            }
        )
    for weights, seconds in (("bf16", 5.6e-3), ("int4 g128", 2.5e-3)):
        row = {"what": "decode", "weights": weights, "batch": 1, "tokens": 1024, "seconds": seconds}
        results["model"].append(row | {"tokens_per_s": 1 / seconds, "bytes_per_s": 3e9 / seconds})
    results["load"] = [
        {
            "weights": "int4 g128",
            "run": 1,
            "checkpoint_bytes": 10**9,
            "finished_bytes": 3 * 10**8,
            "extra_bytes": 9 * 10**7,
        }
        | {"allowed_extra_bytes": 2 * 10**8, "seconds": 1.5, "read_seconds": 0.75}
    ]
    results["errors"] = [
        {
            "section": "model",
            "name": "int8 g128, decoding at batch 1",
            "error": "killed: it took more than 135 s",
        }
    ]
    results["skipped"] = [
        {"section": "model", "name": "bf16, prefill of 2048", "why": "12 s were left, and it takes 30"}
    ]
    results["targets"] = gpu_report.compared(results)
    return results


def test_report():
    assert_expected_inline(
        gpu_report.text(some_results()),
        """\
NVIDIA T800, driver 580.1, CUDA 13.0; torch 2.11.0
copy 3.00 TB/s, read and written; 8192^3 bf16 product 800 TFLOP/s

Weight 8192x8192: times as fast as cuBLAS bf16, by rows of x
kernel                          1    16    32     64    128    256
---------------------------  ----  ----  ----  -----  -----  -----
cuBLAS us, do_bench          67.1  67.1  67.1  134.2  268.4  536.9
rtn int4 g128                2.91  2.91  2.91   2.91   2.91   2.91
rtn int8 g128                1.48  1.48  1.48   1.48   1.48   1.48
humming int4 g128            2.91  2.91  2.91   2.91   2.91   2.91
mslk int4 g128                  x     x     x      x      x      x
cuBLAS us, graph             67.1  67.1  67.1  134.2  268.4  536.9
rtn int4 g128, graph         2.91  2.91  2.91   2.91   2.91   2.91
  % of a copy's bytes/s        50    50    50     25     12      6
  % of the ceiling's FLOP/s     1    12    23     23     23     23
rtn int8 g128, graph         1.48  1.48  1.48   1.48   1.48   1.48
  % of a copy's bytes/s        50    50    50     25     12      6
  % of the ceiling's FLOP/s     0     6    12     12     12     12

Other weights: times as fast as cuBLAS bf16, by rows of x, do_bench
weight and kernel           1    64
-----------------------  ----  ----
6144x4096 rtn int4 g128  2.91  2.91
6144x4096 rtn int8 g128  1.48  1.48

Experts' layers: times as fast as bf16, by tokens, graph
layer and kernel                      1    64
---------------------------------  ----  ----
Mixtral 8x7B, bf16 grouped_mm, us   100   100
  rtn int4 g128                    2.50  1.50
    sorted before                  2.75     -

Llama 8B, random weights
what                 weights    batch    ms  tokens/s  GB/s of weights  over bf16
-------------------  ---------  -----  ----  --------  ---------------  ---------
decode, 1024 tokens  bf16           1  5.60       179              536       1.00
decode, 1024 tokens  int4 g128      1  2.50       400            1,200       2.24

load, 1.00 GB of bf16
weights    run  model MB  above it MB  allowed MB  seconds  floats read in
---------  ---  --------  -----------  ----------  -------  --------------
int4 g128    1       300           90         200     1.50            0.75

Errors of other kernels, and of whole jobs:
  model, int8 g128, decoding at batch 1: killed: it took more than 135 s
  mslk int4 g128: OSError: mslk.so: undefined symbol

Skipped:
  model, bf16, prefill of 2048: 12 s were left, and it takes 30

Correctness: 1234 checks passed, 0 failed, 2 skipped

target                                                          needed      worst measured
--------------------------------------------------------------  -------  -----------------  ------------
rtn int4 g128 8192x8192, M <= 16, do_bench: over cuBLAS         >= 2.3         2.91 at M=1  met
rtn int4 g128 8192x8192, M <= 16, graph: bytes/s over a copy's  >= 0.5         0.50 at M=1  met
rtn int4 g128 8192x8192, M = 32, do_bench: over cuBLAS          >= 1.9        2.91 at M=32  met
rtn int4 g128 8192x8192, M = 64, do_bench: over cuBLAS          >= 1.6        2.91 at M=64  met
rtn int4 g128 8192x8192, M = 128, do_bench: over cuBLAS         >= 1.25      2.91 at M=128  met
rtn int4 g128 8192x8192, M >= 256, do_bench: over cuBLAS        >= 0.95      2.91 at M=256  met
rtn int4 g128 4096x4096, M <= 8, do_bench: over cuBLAS          >= 2.3                   -  not measured
rtn int8 g128 8192x8192, M <= 16, do_bench: over cuBLAS         >= 1.6         1.48 at M=1  MISSED
rtn int8 g128 8192x8192, M >= 256, do_bench: over cuBLAS        >= 0.95      1.48 at M=256  met
Llama 8B, decoding at batch 1, int4 g128: over bf16             >= 2.2                2.24  met
load: bytes above the model over largest tensor + 64 MiB        <= 1     0.45 at int4 g128  met""",
    )


def test_report_of_what_is_wrong():
    results = some_results()
    results["correctness"]["failed"] = [
        {"check": "linear int4 g128", "error": "AssertionError: 3 of 9 elements are out of bound"}
    ]
    results["errors"].append(
        {"section": "correctness", "name": "CUDA graphs", "error": "its process ended (exit code -11)"}
    )
    results["errors"].append(
        {"section": "model", "name": "int4, decoding", "error": "AssertionError: logits that are not finite"}
    )
    results["errors"].append(
        {"section": "linear", "name": "64x32, mslk int4 g128", "error": "its process ended (exit code -11)"}
    )
    results["linear"].append(
        {"N": 64, "K": 32, "M": 3, "kernel": "rtn int8 g128", "error": "ValueError: wrong result"}
    )
    results["moe"].append({"model": "Qwen3", "kernel": "rtn int4 g128", "error": "CompilationError: no"})
    assert_expected_inline(
        "\n".join(gpu_report.wrong(results)),
        """\
linear int4 g128: AssertionError: 3 of 9 elements are out of bound
CUDA graphs: its process ended (exit code -11)
int4, decoding: AssertionError: logits that are not finite
rtn int8 g128, 64x32, 3: ValueError: wrong result
rtn int4 g128, Qwen3, made: CompilationError: no""",
    )
    assert "1234 checks passed, 5 failed, 2 skipped:\n  linear int4 g128: Assert" in gpu_report.text(results)


def test_report_of_nothing():
    results = gpu.no_results()
    results["targets"] = gpu_report.compared(results)
    assert {r["met"] for r in results["targets"]} == {None}
    assert "not measured" in gpu_report.text(results)


def test_a_target_goes_by_the_worst():
    results = some_results()
    rows = {(r["N"], r.get("M"), r["kernel"]): r for r in results["linear"]}
    target = gpu_report.TARGETS[0]
    assert target.what == "rtn int4 g128 8192x8192, M <= 16, do_bench: over cuBLAS"
    assert gpu_report.compared(results)[0]["met"] is True
    rows[8192, 16, "rtn int4 g128"]["do_bench"]["over_cublas"] = 2.2
    found = gpu_report.compared(results)[0]
    assert (found["measured"], found["at"], found["met"]) == (2.2, "M=16", False)
    results["load"][0]["extra_bytes"] = 3 * 10**8
    found = gpu_report.compared(results)[-1]
    assert (found["measured"], found["at"], found["met"]) == (1.5, "int4 g128", False)


def test_report_is_not_too_long():
    """Every kernel at every size."""
    results = some_results()
    shapes, tokens = gpu.sizes(gpu.SHAPES), gpu.numbers(gpu.TOKENS)
    results["linear"] = [r for n, k in shapes for r in linear_rows(n, k, gpu_peers.KERNELS, tokens)]
    one = results["moe"][0]
    results["moe"] = [
        one | {"model": model, "tokens": t, "kernel": kernel, "what": what}
        for model in gpu_peers.MODELS
        for t in gpu.MOE_TOKENS
        for kernel in gpu_peers.MOE_KERNELS
        for what in ("layer", "layer, sorted before")
    ]
    results["model"] = [
        r | {"batch": b, "what": what}
        for r in results["model"]
        for b in (1, 16)
        for what in ("decode", "prefill")
    ]
    results["load"] *= 6
    results["errors"] *= 20
    results["skipped"] *= 20
    assert len(gpu_report.text(results)) < 11_500


def test_picture(tmp_path):
    results = some_results()
    results["machine"]["versions"]["triton"] = "3.6.0"
    (tmp_path / "gpu-a.json").write_text(json.dumps(results))
    for name in ("a.svg", "b.svg"):
        pictures.write(pictures.gpu, tmp_path / "gpu-a.json", tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()
    for text in (
        "humming int4 g128",
        "weight [6144, 4096]",
        "roofline int4",
        "NVIDIA T800, torch 2.11.0, Triton 3.6.0",
        "do_bench",
    ):
        assert text in drawn
    row = results["linear"][0]
    assert pictures.roofline(row, "graph", "rtn int4 g128", results["ceilings"]) == pytest.approx(
        1.5 * 16384 / (4096 + 128)
    )
    results["ceilings"] = {}
    (tmp_path / "gpu-a.json").write_text(json.dumps(results))
    pictures.write(pictures.gpu, tmp_path / "gpu-a.json", tmp_path / "c.svg")
    assert "roofline" not in (tmp_path / "c.svg").read_text()


def test_json_has_a_row_a_line(tmp_path):
    gpu.write(
        {"a": [], "b": {"c": (1.23456789, None)}, "d": [{"e": 2}, {"e": 1e-7 / 3}]}, tmp_path / "a.json"
    )
    written = (tmp_path / "a.json").read_text()
    assert_expected_inline(
        written,
        """\
{"a": [],
"b": {"c": [1.2346, null]},
"d": [
{"e": 2},
{"e": 3.3333e-08}
]}
""",
    )
    assert json.loads(written)["b"] == {"c": [1.2346, None]}


def test_into_keeps_what_was_told(tmp_path):
    results, file = gpu.no_results(), tmp_path / "a.json"
    tell = gpu.into(results, file)
    tell(job("correctness", "x"), "row", {"check": "c", "skipped": "no time was left"})
    tell(job("linear", "y"), "row", {"kernel": "k"})
    tell(job("linear", "y"), "error", "killed")
    assert not file.exists()
    tell(job("linear", "y"), "done", 1.234)
    found = json.loads(file.read_text())
    assert found["correctness"] == {"passed": 0, "skipped": 1, "failed": []}
    assert (found["linear"], found["jobs"]) == (
        [{"kernel": "k"}],
        [{"section": "linear", "name": "y", "seconds": 1.2}],
    )
    assert found["errors"] == [{"section": "linear", "name": "y", "error": "killed"}]
