"""A peer in a process of its own, which answers each line that it is given with one."""

import subprocess
import tempfile
from collections.abc import Mapping, Sequence


class Peer:
    """Started at once; `version` is its first line."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None):
        self.name, self._said = name, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said
        )
        self.version = self._line()

    def _line(self) -> str:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            self._said.seek(0)
            raise RuntimeError(f"{self.name}'s process ended:\n{self._said.read()[-4000:]}")
        return line.strip()

    def number(self, question: str) -> float:
        """What it answers."""
        print(question, file=self.process.stdin, flush=True)
        return float(self._line())

    def close(self) -> None:
        """Ends it, as it has no more questions."""
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()
        self.process.stdout.close()  # type: ignore[union-attr]
        self._said.close()
