"""What a person sees on a terminal: bars of downloads and of quantizing, and chat's Ctrl-C."""

import fcntl
import io
import os
import pty
import re
import shutil
import signal
import struct
import sys
import termios

import pytest
from hub import Hub, serving

from rtn_tensor.cli import parser, talk

COLUMNS = 60


@pytest.fixture
def on_terminal(tmp_path):
    """What the command writes on a terminal of few columns, without colours, in pieces between the moves of
    the cursor."""

    def run(*args, **env):
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(tmp_path)
            kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
            command = [sys.executable, "-m", "rtn_tensor", *map(str, args)]
            os.execve(sys.executable, command, kept | {"TERM": "xterm"} | env)
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        data = b""
        try:
            while piece := os.read(terminal, 1 << 16):
                data += piece
        except OSError:  # the other end is closed
            pass
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, data
        text = re.sub(r"\x1b\[[0-9;?]*m", "", data.decode())
        return [piece for piece in re.split(r"[\r\n]|\x1b\[[0-9;?]*[a-zA-Z]", text) if piece.strip()]

    return run


def test_bars(on_terminal, source, tmp_path):
    with serving(Hub({"tiny/llama": source})) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        first = on_terminal("quantize", "tiny/llama", "q", **env)
        again = on_terminal("quantize", "tiny/llama", "q", "--dry-run", **env)
    assert any(re.fullmatch(r"Downloading tiny/llama: \d files, \d+\.\d kB", piece) for piece in first)
    assert any("Fetching" in piece and "100%" in piece for piece in first)
    # The name, and not the commit that the cache's folder is called by.
    assert any(re.fullmatch(r"tiny/llama: 0 MB in \d\.\d s, \d+ MB/s", piece) for piece in first)
    bars = [piece for piece in first if "━" in piece]
    assert any(re.search(r"━ +357\.\d/357\.\d kB .*/s 0:00:00 model\.", piece) for piece in bars)
    assert max(map(len, bars)) <= COLUMNS
    # What is in the cache shows none.
    assert not any("Fetching" in piece or "Downloading" in piece for piece in again)


@pytest.fixture
def stopped(monkeypatch):
    """Has the second reply stop as Ctrl-C does, after a word."""
    calls, generate = [], talk.generate

    def and_stop(*args, on_text, **kwargs):
        calls.append(list(args[2]))
        if len(calls) == 2:
            on_text("Well")
            raise KeyboardInterrupt(signal.SIGINT)
        return generate(*args, on_text=on_text, **kwargs)

    monkeypatch.setattr(talk, "generate", and_stop)
    return calls


def typed(monkeypatch, *lines, terminal=True):
    text = io.StringIO("".join(f"{line}\n" for line in lines))
    text.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", text)


@pytest.fixture
def chatty(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "chatty")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    return folder


def test_ctrl_c_ends_a_reply_and_not_the_chat(run, chatty, monkeypatch, stopped):
    typed(monkeypatch, "We the people", "In order", "to form")
    status, out, err = run("chat", chatty, "--max-new-tokens", 4)
    assert status == 0, err
    assert len(stopped) == 3
    said = stopped[2]
    assert [each["role"] for each in said] == ["user", "assistant"] * 2 + ["user"]
    assert said[3]["content"] == "Well"  # what was written before it stays in the conversation
    assert "Ctrl-C ends a reply" in err


def test_ctrl_c_ends_a_chat_that_reads_a_file(run, chatty, monkeypatch, stopped):
    typed(monkeypatch, "We the people", "In order", "to form", terminal=False)
    assert run("chat", chatty, "--max-new-tokens", 4)[0] == 130


def test_every_command_has_an_example():
    (commands,) = (action.choices for action in parser()._subparsers._group_actions)
    for name, sub in commands.items():
        assert f"  rtn-tensor {name} " in sub.format_help().partition("\nexample")[2], name
