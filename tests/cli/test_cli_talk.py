"""`generate`, `chat` and `serve`."""

import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from rtn_tensor import load
from rtn_tensor.evaluation.generation import Sampling, generate

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
RATE = r"\d+ tokens in \d+\.\d s, \d+\.\d tokens per second\n"


@pytest.fixture
def chatty(source, tmp_path):
    """A model with a chat template."""
    folder = shutil.copytree(source, tmp_path / "chatty")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_pieces_come_as_they_are_written(source):
    from transformers import AutoTokenizer

    model, tokenizer = load(source), AutoTokenizer.from_pretrained(source)
    pieces = []
    found = generate(model, tokenizer, "We the people", 12, on_text=pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces).strip() == found.text


def test_raw(run, chatty):
    asked = run("generate", chatty, "We the people", "--max-new-tokens", 6, "--json")[1]
    as_it_is = run("generate", chatty, "We the people", "--max-new-tokens", 6, "--raw", "--json")[1]
    assert json.loads(asked)["text"] != json.loads(as_it_is)["text"]


def test_sampling(run, source):
    args = ["generate", source, "We the people", "--max-new-tokens", 12, "--json"]

    def text(*more):
        status, out, err = run(*args, *more)
        assert status == 0, err
        return json.loads(out)["text"]

    drawn = text("--temperature", 2, "--seed", 3)
    assert drawn == text("--temperature", 2, "--seed", 3) != text("--temperature", 2, "--seed", 4)
    assert text("--temperature", 2, "--top-p", 0.001) == text()  # only the likeliest is left
    status, _, err = run(*args, "--top-p", 0.5)
    assert status == 1
    assert "--top-p and --seed are for sampling; add --temperature" in err
    status, _, err = run(*args, "--temperature", 1, "--compile")
    assert status == 1
    assert "compiled decoding takes the likeliest token" in err


def test_what_sampling_cannot_be():
    with pytest.raises(ValueError, match="temperature=0; it must be above 0"):
        Sampling(0)
    with pytest.raises(ValueError, match="top_p=1.5; it must be above 0 and at most 1"):
        Sampling(top_p=1.5)


def test_chat(run, chatty, monkeypatch):
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("We the people\n\nIn order\n/clear\nWe the people\n/bye\nno\n")
    )
    status, out, err = run("chat", chatty, "--max-new-tokens", 6, "--json")
    assert status == 0, err
    text, _, messages = out.rpartition('{"messages": ')
    first, second, third = text.splitlines()
    assert first == third  # the same question, of an empty chat again
    said = json.loads(messages[:-2])
    assert [each["role"] for each in said] == ["user", "assistant"]
    assert len(re.findall(RATE, err)) == 3
    assert "/clear begins anew" in err


def test_a_chat_that_becomes_too_long_goes_on(run, chatty, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'We the people ' * 500}\nWe\n"))
    status, out, err = run("chat", chatty, "--max-new-tokens", 6)
    assert status == 0
    assert "positions (max_position_embeddings)" in err
    assert len(re.findall(RATE, err)) == 1


def test_a_chat_needs_a_template(run, source):
    status, out, err = run("chat", source)
    assert (status, out) == (1, "")
    assert err == f"rtn-tensor: error: {source} has no chat template; use generate, which continues a text\n"


def test_serve_where_it_cannot_listen(run, chatty):
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, out, err = run("serve", chatty, "--host", "127.0.0.1", "--port", port)
    assert (status, out) == (1, "")
    assert err.startswith(f"rtn-tensor: error: cannot listen at 127.0.0.1:{port} (Address already in use")
    assert err.endswith("choose another --port or --host\n")


@pytest.mark.slow
def test_serve(run, chatty, tmp_path):
    pytest.importorskip("uvicorn")
    assert run("quantize", chatty, tmp_path / "q")[0] == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "rtn_tensor", "serve", str(tmp_path / "q"), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        ask = {"model": str(tmp_path / "q"), "messages": [{"role": "user", "content": "We"}], "max_tokens": 6}
        request = urllib.request.Request(
            f"http://localhost:{port}/v1/chat/completions",
            json.dumps(ask).encode(),
            {"Content-Type": "application/json"},
        )
        for _ in range(120):
            try:
                answer = json.load(urllib.request.urlopen(request, timeout=60))
                break
            except ConnectionError:
                time.sleep(0.5)
            except urllib.error.URLError as error:
                if not isinstance(error.reason, ConnectionError):
                    raise
                time.sleep(0.5)
        assert answer["choices"][0]["message"]["role"] == "assistant"
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
