"""The command of benchmarks/gpu.py: its arguments, jobs and sections."""

import importlib
import inspect
import json
import multiprocessing

import pytest
import torch
from expecttest import assert_expected_inline
from test_gpu_benchmark import endless, linear_rows

from benchmarks import gpu, gpu_check_jobs
from benchmarks.gpu_peers import CUBLAS


def test_arguments():
    args = gpu.arguments([])
    assert (args.seconds, args.json, tuple(args.only)) == (540, None, gpu.SECTIONS)
    assert args.shapes[:2] == [(8192, 8192), (4096, 4096)]
    assert len(args.shapes) == 6
    assert args.tokens == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]
    args = gpu.arguments(
        [
            "--only",
            "load,moe",
            "--shapes",
            "64x32,1x2",
            "--tokens",
            "3",
            "--seconds",
            "60",
            "--json",
            "a.json",
        ]
    )
    assert (args.only, args.shapes, args.tokens, args.seconds, args.json.name) == (
        ["load", "moe"],
        [(64, 32), (1, 2)],
        [3],
        60,
        "a.json",
    )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--only", "linear,speed"], "'speed' is no section; use correctness, linear, moe, model, load"),
        (["--shapes", "4096"], "'4096' is not sizes as 4096x4096,8192x8192 (out_features x in_features)"),
        (["--tokens", "1,0"], "'1,0' is not numbers of rows as 1,16,256"),
    ],
)
def test_wrong_arguments(given, says, capsys):
    with pytest.raises(SystemExit) as error:
        gpu.arguments(given)
    assert error.value.code == 2
    assert says in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert_expected_inline(
        capsys.readouterr().err,
        """There is no CUDA GPU here that this torch can use; nothing was measured.\n""",
    )


def every_job():
    shapes, tokens = gpu.sizes(gpu.SHAPES), gpu.numbers(gpu.TOKENS)
    return [*gpu.timing_jobs(shapes, tokens), *gpu_check_jobs.jobs(shapes, tokens, gpu.MOE_TOKENS)]


def test_every_job_names_a_function_that_takes_its_arguments():
    for each in every_job():
        module, _, name = each.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        inspect.signature(function).bind(print, endless(), **each.arguments)
        multiprocessing.reduction.ForkingPickler.dumps(each.arguments)
        assert each.section in gpu.SECTIONS
        assert each.least < each.most


def test_what_matters_most_comes_first(monkeypatch):
    monkeypatch.setattr(gpu, "installed", lambda kernel: kernel.package in (None, "humming"))
    jobs = gpu.timing_jobs([(6144, 4096), (4096, 4096), (8192, 8192)], [1, 16])
    assert_expected_inline(
        "\n".join(f"{each.section}: {each.name}" for each in jobs[:14]),
        """\
linear: 8192x8192, ours
linear: 4096x4096, ours
model: bf16, decoding at batch 1
model: int4 g128, decoding at batch 1
linear: 8192x8192, tinygemm int4 g128
linear: 8192x8192, humming int4 g128
moe: Mixtral 8x7B
moe: Qwen3 30B-A3B
moe: DeepSeek V3, TP 8
load: 1 GB
linear: 8192x8192, humming int8 g128
linear: 8192x8192, torchao int8 g-1
linear: 6144x4096, ours
model: int8 g128, decoding at batch 1""",
    )
    assert not any("gemlite" in each.name or "marlin" in str(each.arguments) for each in jobs)
    assert jobs[0].arguments["kernels"][0] == CUBLAS


def test_correctness_covers_every_format_and_op():
    jobs = gpu_check_jobs.jobs([(8192, 8192)], [1, 4096], [1])
    forms = {
        (j.arguments.get("op"), *(j.arguments[key] for key in ("dtype", "bits", "group_size")))
        for j in jobs
        if "bits" in j.arguments
    }
    for dtype in ("bfloat16", "float16", "float32"):
        for bits in (4, 8):
            for group_size in (32, 64, 96, 128, -1):
                for op in ("linear", "linear_dx", "grouped", "grouped_dx", None):
                    assert (op, dtype, bits, group_size) in forms
    assert {j.arguments["mode"] for j in jobs if "mode" in j.arguments} == {
        "default",
        "reduce-overhead",
        "max-autotune",
    }


class Told:
    """In the place of a Worker: rows that are known before, and no process."""

    wrong = False

    def __init__(self, environment=None):
        self.environment = environment

    def run(self, job, seconds, row):
        if job.section == "correctness":
            row(
                {
                    "check": job.name,
                    "error": "AssertionError: no" if self.wrong and "CUDA graphs" in job.name else None,
                }
            )
        elif job.section == "machine":
            row({"gpu": "NVIDIA T800 (fake)", "versions": {"torch": "2.11"}})
        elif job.section == "ceilings":
            row({"copy_bytes_per_s": 3e12, "matmul_flop_per_s": 8e14})
        elif job.section == "linear":
            for row_ in linear_rows(*job.arguments["shape"], job.arguments["kernels"]):
                row(row_)
        return "killed: it took more than 135 s" if job.section == "model" else None

    def stop(self):
        pass


@pytest.mark.parametrize("wrong", [False, True])
def test_a_whole_run_ends_in_json_and_a_status(wrong, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "Worker", Told)
    monkeypatch.setattr(Told, "wrong", wrong)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.main(["--seconds", "1000"]) == wrong
    out = capsys.readouterr().out
    assert ("WRONG: CUDA graphs: AssertionError: no" in out) == wrong
    assert out.rstrip().endswith("gpu-NVIDIA-T800-fake.json")
    results = json.loads((tmp_path / "benchmarks" / "results" / "gpu-NVIDIA-T800-fake.json").read_text())
    assert list(results) == [
        *(
            "machine",
            "ceilings",
            "correctness",
            "linear",
            "moe",
            "model",
            "load",
            "errors",
            "skipped",
            "jobs",
            "targets",
            "seconds",
        )
    ]
    assert results["correctness"]["failed"] == (
        [{"check": "CUDA graphs", "error": "AssertionError: no"}] if wrong else []
    )
    assert (
        results["correctness"]["passed"] == len(gpu_check_jobs.jobs(gpu.sizes(gpu.SHAPES), [1], [1])) - wrong
    )
    assert {e["section"] for e in results["errors"]} == {"model"}
    assert {len(r["target"]) > 0 for r in results["targets"]} == {True}


def test_only_some_sections(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "Worker", Told)
    assert gpu.main(["--only", "load", "--json", str(tmp_path / "new" / "a.json")]) == 0
    results = json.loads((tmp_path / "new" / "a.json").read_text())
    assert [j["name"] for j in results["jobs"]] == ["about", "1 GB"]
