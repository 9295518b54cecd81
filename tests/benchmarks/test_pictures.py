"""The pictures of README and docs are drawn from the results that lie beside them."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from rtn_tensor.formats import FORMATS, pack

pictures = pytest.importorskip(
    "benchmarks.pictures", reason="matplotlib is not installed", exc_type=ImportError
)

DRAWN = pictures.ROOT / "docs/pictures"
KNOWN = pictures.known(pictures.ROOT / "benchmarks/results")
PINNED = re.search(r"^matplotlib==(\S+)", (pictures.ROOT / "requirements.txt").read_text(), re.M)[1]


def drawn(name: str, to: Path) -> bytes:
    draw, results = KNOWN[name]
    pictures.write(draw, pictures.ROOT / "benchmarks/results" / results if results else None, to)
    return to.read_bytes()


@pytest.mark.parametrize("name", KNOWN)
def test_a_picture_is_600_pixels_wide_and_current(name, tmp_path):
    found = drawn(name, tmp_path / "a.svg")
    assert re.search(rb'width="450pt"', found)  # of 96 pixels per 72 points
    assert len(found) < 300_000
    if version("matplotlib") == PINNED:
        assert found == (DRAWN / f"{name}.svg").read_bytes(), (
            f"`python -m benchmarks.pictures {name}` draws it anew"
        )


def test_no_picture_is_left_over():
    assert {path.stem for path in DRAWN.iterdir()} == KNOWN.keys()


def test_the_speed_of_every_kernel_is_drawn(tmp_path):
    rows = [
        {
            "dtype": "bfloat16",
            "N": n,
            "K": 64,
            "M": m,
            "kernel": kernel,
            "seconds": 1.0,
            "over_dense": ratio / m,
        }
        for n in (32, 64, 96)
        for kernel, ratio in (("dense", 1.0), ("rtn int4 g128", 4.0))
        for m in (1, 8)
    ]
    made = pictures.linear(
        {
            "machine": {"cpu": "a processor", "threads": 2, "instruction_set": "generic", "torch": "2"},
            "rows": rows,
        }
    )
    made.savefig(tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    for part in ("rtn int4 g128", "weight [96, 64]", "a processor, 2 threads, generic, torch 2"):
        assert part in text


def test_a_server_under_load_is_drawn(tmp_path):
    times = {"first_token_p50": 0.1, "first_token_p99": 0.2, "next_token_p50": 0.03, "next_token_p99": 0.04}
    rows = [
        {"weights": weights, "users": users, "requests_per_second": 2.0, **times}
        for weights in ("int4", "int4 by vLLM")
        for users in (1, 16)
    ]
    about = {"machine": {"cpu": "a processor", "cores": 2}, "model": "a model"}
    about |= {"servers": {row["weights"]: {} for row in rows}, "rows": rows}
    (tmp_path / "serving-load.json").write_text(json.dumps(about))
    draw, name = pictures.known(tmp_path)["serving-load"]
    pictures.write(draw, tmp_path / name, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    for part in (
        "a model, a processor, 2 cores",
        "first token, s",
        "99th percentile",
        "<!-- 16 -->",
        "<!-- int4 by vLLM -->",
    ):
        assert part in text


@pytest.mark.parametrize("bits", FORMATS)
def test_the_layout_is_as_it_is_drawn(bits):
    for k in range(128 // bits):
        words = pack((torch.arange(128 // bits) == k).to(torch.int8), bits).view(torch.int16).tolist()
        assert words == [(1 << bits * (k // 8)) if word == k % 8 else 0 for word in range(8)]
