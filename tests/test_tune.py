"""`rtn-tensor tune` and the table it writes. The time of a launch is made up, so that the choice is known; on
a GPU, benchmarks/gpu.py."""

import json
from functools import partial

import pytest
import torch
from expecttest import assert_expected_inline

from rtn_tensor import kernels, tuning
from rtn_tensor.cli import main
from rtn_tensor.kernels import registry
from rtn_tensor.kernels.problem import Problem
from rtn_tensor.kernels.triton import config as configs
from rtn_tensor.kernels.triton.config import Config, Gpu, Shape

H100 = Gpu("NVIDIA H100 80GB HBM3", 132, 232448, "3.6")
SHAPE = Shape("linear", 4, 128, 2, 16, 4096, 4096)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RTN_TUNED", str(tmp_path / "tuned"))
    monkeypatch.setattr(configs, "SHIPPED", tmp_path / "shipped")
    forget()
    yield
    forget()


def forget():
    configs.tuned_table.cache_clear()
    configs.configure.cache_clear()
    registry.forget()


def config_of(run):
    """The configuration that a measured run would launch; None for the dense product."""
    assert isinstance(run, partial)
    return run.args[0]


def wide_is_fast(run):
    config = config_of(run)
    return 0.5 if config is None else 1 / (config.block_k * config.num_stages + config.block_n / 1000)


def row(shape, config, **more):
    return {
        "shape": shape._asdict(),
        "config": config and config._asdict(),
        "microseconds": 1.0,
        "rule_microseconds": 2.0,
        **more,
    }


# -------------------------------------------------------------------------------- the rule


SHAPES = [
    Shape(op, bits, group_size, itemsize, m, n, k)
    for op in ("linear", "grouped")
    for bits in (4, 8)
    for group_size in (32, 64, 96, 128, 160, 256, 1024, -1)
    for itemsize in (2, 4)
    for m in (0, 1, 2, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
    for n, k in ((1, 32), (5, 100), (4096, 4096), (28672, 8192), (576, 1536))
]
GPUS = [
    H100,
    Gpu("NVIDIA A100-SXM4-80GB", 108, 166912, "3.6"),
    Gpu("NVIDIA GeForce RTX 4090", 128, 101376, "3.6"),
]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_rule_gives_what_the_kernels_take(gpu):
    for shape in SHAPES:
        config = configs.by_rule(shape, gpu)
        if config is None:
            assert shape.op == "linear"
            assert shape.M >= configs.DENSE_FROM
            continue
        assert configs.takes(config.block_k, shape.group_size, config.scale_after), (shape, config)
        assert configs.fits(config, gpu, shape), (shape, config)
        assert config.num_warps * 16 <= config.block_n * (2 if config.num_warps == 8 else 1)
        steps = -(-max(shape.K, 1) // config.block_k)
        per_part = -(-steps // config.split_k)
        assert (config.split_k - 1) * per_part < steps, "every part has a step"
        if shape.op == "grouped":
            assert config.split_k == 1


@pytest.mark.parametrize("steps", range(1, 70))
def test_every_part_has_some_steps(steps):
    for wanted in range(-1, 80):
        parts = configs.split(steps, wanted)
        assert 1 <= parts <= max(1, min(wanted, steps))
        assert (parts - 1) * -(-steps // parts) < steps


def test_what_the_kernels_take():
    assert configs.takes(128, 128, True)
    assert configs.takes(64, 128, True)
    assert not configs.takes(256, 128, True)
    assert not configs.takes(128, 96, True)
    assert configs.takes(32, 96, True)
    assert configs.takes(256, -1, True)
    assert not configs.takes(256, -1, False)
    assert configs.takes(128, 32, False)
    assert not configs.takes(256, 32, False)
    assert configs.takes(128, 96, False)
    assert not configs.takes(256, 96, False)
    assert configs.takes(256, 64, False)


# ------------------------------------------------------------------------------- the table


def test_table_comes_before_the_rule_and_the_users_before_ours(tmp_path):
    ours, mine = Config(16, 64, 64, 2, True, 4, 2), Config(16, 128, 128, 1, True, 8, 3)
    other = SHAPE._replace(N=8192)
    for folder, rows in (("shipped", [row(SHAPE, ours), row(other, ours)]), ("tuned", [row(SHAPE, mine)])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "NVIDIA-H100-80GB-HBM3-triton-3.6.json").write_text(json.dumps({"rows": rows}))
    assert configs.configure(SHAPE, H100) == mine
    assert configs.configure(other, H100) == ours
    assert configs.configure(SHAPE._replace(M=32), H100) == configs.by_rule(SHAPE._replace(M=32), H100)
    assert configs.configure(SHAPE, H100._replace(triton="3.7")) == configs.by_rule(SHAPE, H100)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"rows": [{}]}', '{"rows": [{"shape": {"op": "linear"}, "config": null}]}']
)
def test_table_that_is_not_one_is_refused_by_name(tmp_path, text):
    (tmp_path / "tuned").mkdir()
    file = tmp_path / "tuned" / H100.file_name
    file.write_text(text)
    with pytest.raises(ValueError, match=f"{file} is not a table"):
        configs.configure(SHAPE, H100)
    with pytest.raises(ValueError, match=f"{file} is not a table"):
        tuning.write_table(H100, [])
    assert file.read_text() == text


def test_shipped_tables_are_read():
    for file in (configs.Path(configs.__file__).with_name("tuned")).glob("*.json"):
        rows = json.loads(file.read_text())["rows"]
        for shape, config in ((Shape(**r["shape"]), r["config"]) for r in rows):
            assert config is None or configs.takes(config["block_k"], shape.group_size, config["scale_after"])


# ---------------------------------------------------------------------------------- tuning


def test_candidates():
    for shape in SHAPES:
        if shape.M and shape.itemsize == 2 and shape.op == "linear":
            found = tuning.candidates(shape, H100)
            assert len(set(found)) == len(found)
            assert found, shape
            for config in found:
                assert configs.takes(config.block_k, shape.group_size, config.scale_after)
                assert configs.fits(config, H100, shape)


def test_fastest_is_remembered_and_used(tmp_path):
    rows = tuning.tune([(512, 1024)], tokens=[3, 4, 512], device="cpu", measure=wide_is_fast)
    assert [r["shape"]["M"] for r in rows] == [4, 512]
    gpu = Gpu("interpreter", 132, 232448, "")
    for r in rows:
        shape, config = Shape(**r["shape"]), Config(**r["config"])
        measured = {
            c: wide_is_fast(partial(print, c))
            for c in [*tuning.candidates(shape, gpu), configs.by_rule(shape, gpu)]
        }
        assert measured[config] == min(measured.values())
        assert r["microseconds"] <= r["rule_microseconds"]
        assert configs.configure(shape, gpu) == config
    first = (tmp_path / "tuned" / gpu.file_name).read_text()
    # Another size is added, the same size replaced.
    tuning.tune([(512, 1024), (64, 64)], tokens=[4], device="cpu", measure=lambda run: 1 - wide_is_fast(run))
    table = configs.tuned_table(gpu.file_name)
    assert {(s.M, s.N) for s in table} == {(4, 512), (512, 512), (4, 64)}
    assert len(json.loads((tmp_path / "tuned" / gpu.file_name).read_text())["rows"]) == 3
    assert (
        json.loads(first)["rows"][1] in json.loads((tmp_path / "tuned" / gpu.file_name).read_text())["rows"]
    )


def test_dense_is_remembered_and_leaves_the_problem_to_the_dense_kernel(monkeypatch):
    def dense_is_fast(run):
        return 1.0 if config_of(run) is None else 2.0

    tuning.tune([(512, 1024)], group_size=128, tokens=[512], device="cpu", measure=dense_is_fast)
    monkeypatch.setattr(kernels.triton, "interpreting", lambda: True)
    monkeypatch.setenv("RTN_KERNEL", "")
    problem = Problem("linear", "cpu", None, torch.bfloat16, torch.bfloat16, 4, 128, 512, 512, 1024)
    assert_expected_inline(
        str(kernels.triton.why_not(problem)),
        """From M = 512 on it is faster to dequantize the weight and multiply it densely.""",
    )
    assert kernels.triton.why_not(problem._replace(M=256)) is None
    assert kernels.triton.rounds_weight(problem)


def test_a_configuration_that_triton_refuses_is_passed_over():
    from triton.runtime.errors import OutOfResources

    def refuses_wide(run):
        config = config_of(run)
        if config and config.block_k == 256 and config.num_stages == 5:
            raise OutOfResources(300000, 232448, "shared memory")
        return wide_is_fast(run)

    (r,) = tuning.tune([(512, 1024)], tokens=[16], device="cpu", measure=refuses_wide)
    assert (r["config"]["block_k"], r["config"]["num_stages"]) == (256, 4)


def test_an_error_that_is_not_tritons_is_raised():
    calls = []

    def fails(run):
        calls.append(run)
        if len(calls) == 5:
            raise ZeroDivisionError
        return 1.0

    with pytest.raises(ZeroDivisionError):
        tuning.tune([(512, 1024)], tokens=[16], device="cpu", measure=fails)
    assert not configs.tuned_folder().exists()


def test_tuning_without_a_gpu_is_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["tune", "--size", "4096x4096"]) == 1
    assert_expected_inline(
        capsys.readouterr().err,
        """rtn-tensor: error: device='cuda': tuning measures kernels on a CUDA GPU, and there is none\n""",
    )
    assert main(["tune"]) == 1
    assert_expected_inline(
        capsys.readouterr().err,
        """rtn-tensor: error: nothing to tune for; name a model's folder with --model, or sizes with --size\n""",
    )
    for size in ("4096", "0x64", "ax4"):
        with pytest.raises(SystemExit):
            main(["tune", "--size", size])
        assert "is no weight's size; write out_features x in_features" in capsys.readouterr().err


def test_report(monkeypatch, capsys, tmp_path):
    fake = partial(tuning.tune, measure=wide_is_fast)
    monkeypatch.setattr("rtn_tensor.cli.kernels.tune", lambda *args, **more: fake(*args, **more))
    assert main(["tune", "--size", "512x1024", "--tokens", "1", "64", "--device", "cpu"]) == 0
    out = capsys.readouterr().out.replace(str(tmp_path), "FOLDER")
    assert_expected_inline(
        out,
        """\
weight       tokens     us  us before
-----------  ------  -----  ---------
[512, 1024]       1  781.2     1952.9
[512, 1024]      64  781.2     2603.3
written to FOLDER/tuned
""",
    )


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_place_that_cannot_be_written_is_seen_before_anything_is_measured(monkeypatch, tmp_path, name):
    (tmp_path / "file").write_text("text")
    monkeypatch.setenv("RTN_TUNED", str(tmp_path / name))
    with pytest.raises(OSError, match="file is no folder; set RTN_TUNED to a folder that can be written"):
        tuning.tune(
            [(512, 1024)], tokens=[16], device="cpu", measure=lambda run: pytest.fail("it was measured")
        )


@pytest.mark.parametrize(
    ("sizes", "tokens"), [([(0, 64)], [1]), ([(64, -64)], [1]), ([(64, 64)], [0]), ([(64, 64.0)], [1])]
)
def test_sizes_that_are_none(sizes, tokens):
    with pytest.raises(ValueError, match="whole numbers of 1 or more"):
        tuning.tune(sizes, tokens=tokens, device="cpu", measure=lambda run: pytest.fail("it was measured"))
