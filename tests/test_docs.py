"""Every block of the README and every tutorial runs as it stands."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.real_model import CACHE, ModelUnavailable, smollm2, state_of_the_union, task_data

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# torch itself still calls what it deprecates when inductor is imported; and all runs without a compiler, too.
ALLOWED = [
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "ignore:rtn_tensor runs quantized layers in plain torch:UserWarning",
]
STRICT = ["-W", "error", *(argument for allowed in ALLOWED for argument in ("-W", allowed))]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)


def run(command: list[str], cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_readme_has_only_kinds_of_blocks_that_are_run_here():
    assert {kind for kind, _ in BLOCKS} <= {"python", "sh", "text"}
    shell = "".join(text for kind, text in BLOCKS if kind == "sh").splitlines()
    assert {line.split()[0] for line in shell if line} <= {"make", "pip", "python", "rtn-tensor", "vllm"}


def test_readme_python_commands_name_files_that_are_there():
    commands = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line.startswith("python ")]
    assert all((ROOT / command.split()[1]).is_file() for command in commands)


def test_readme_python(tmp_path):
    # In one process, in order, as a reader would type them.
    program = "\n".join(text for kind, text in BLOCKS if kind == "python")
    assert "import rtn_tensor" in program or "from rtn_tensor" in program
    run([sys.executable, *STRICT, "-c", program], tmp_path)


@pytest.mark.slow
def test_readme_commands(tmp_path):
    commands = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line.startswith("rtn-tensor ")]
    assert len(commands) >= 4
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness, which one of them runs, is not installed")
    try:
        smollm2(), state_of_the_union(), task_data()
    except ModelUnavailable as reason:
        pytest.skip(str(reason))
    (tmp_path / ".cache").symlink_to(CACHE)
    for command in commands:
        assert run([sys.executable, "-m", "rtn_tensor", *shlex.split(command)[1:]], tmp_path).strip()


@pytest.mark.parametrize("tutorial", sorted((ROOT / "tutorials").glob("*.py")), ids=lambda path: path.stem)
def test_tutorial(tutorial, tmp_path):
    lines = tutorial.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 80
    how, file = lines[2].rsplit(maxsplit=1)
    assert file == f"tutorials/{tutorial.name}"
    if how == "python":
        assert run([sys.executable, *STRICT, str(tutorial)], tmp_path)
    else:  # its processes inherit no -W
        torchrun, *options = how.split()
        assert torchrun == "torchrun"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options, str(tutorial)]
        assert run(command, tmp_path, PYTHONWARNINGS=",".join(["error", *ALLOWED]))
