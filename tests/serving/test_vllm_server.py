"""The server that a user starts, by OpenAI's own client: its answers, and rough treatment."""

import json
import threading
import time

import httpx
import openai
import pytest
from engine import ROUNDING, difference, rtn
from transformers import AutoTokenizer
from vllm_models import reference

from benchmarks.vllm_server import Server
from rtn_tensor import rtn_int4

OPTIONS = ["--quantization", "rtn", "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4"]
OPTIONS += ["--enforce-eager", "--served-model-name", "tiny", "--shutdown-timeout", "60"]
OPTIONS += ["--hf-overrides", json.dumps(rtn(group_size=64)["hf_overrides"])]
MESSAGES = [{"role": "user", "content": "hello"}]
PATIENCE = 120  # seconds, of a machine that does other work, too


@pytest.fixture(scope="module")
def servers(folder, tmp_path_factory):
    """Two, which start at the same time; a test may end the second one."""
    env = {"RTN_NUM_BITS": "4", "RTN_GROUP_SIZE": "32"}
    work = tmp_path_factory.mktemp("servers")
    found = [Server(folder("llama"), work / str(i), OPTIONS, env) for i in range(2)]
    try:
        for server in found:
            server.wait_until_ready()
        yield found
    finally:
        for server in found:
            server.kill()


@pytest.fixture
def server(servers):
    return servers[0]


def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


def ask(server, new=8, **options):
    extra = {"ignore_eos": True, "return_token_ids": True}
    return client(server).chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        temperature=0,
        max_tokens=new,
        logprobs=True,
        extra_body=extra,
        **options,
    )


def tokens(answer) -> list[int]:
    return answer.choices[0].model_extra["token_ids"]


def told(server, *names) -> float:
    """The sum of these numbers that the server tells Prometheus."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith(tuple(f"vllm:{n}{{" for n in names))
    )


def busy(server) -> bool:
    return told(server, "num_requests_running", "num_requests_waiting") > 0


def until(true):
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_answers_are_those_of_the_quantized_model(folder, server):
    """As the command's options and the environment say: of two group sizes, the option counts."""
    path, answer = folder("llama"), ask(server)
    ids = AutoTokenizer.from_pretrained(path).apply_chat_template(MESSAGES, return_dict=True)["input_ids"]
    logprobs = [step.logprob for step in answer.choices[0].logprobs.content]
    assert len(tokens(answer)) == 8
    model = reference(path, rtn_int4(64, "absmax"))
    assert difference(model, [(tokens(answer), logprobs)], [ids]) < ROUNDING["float32"]


def test_a_client_that_hangs_up(server):
    """Its request ends in the engine, too, before all of its tokens are made."""
    before, made = tokens(ask(server)), told(server, "generation_tokens_total")
    with ask(server, new=200, stream=True) as stream:
        next(iter(stream))
    until(lambda: not busy(server))
    assert 0 < told(server, "generation_tokens_total") - made < 200
    assert tokens(ask(server)) == before


def test_a_prompt_longer_than_the_context(server):
    before = tokens(ask(server))
    with pytest.raises(openai.BadRequestError, match="256") as refused:
        client(server).completions.create(model="tiny", prompt=[5] * 300, max_tokens=8)
    assert refused.value.status_code == 400
    assert tokens(ask(server)) == before


def test_a_killed_engine_ends_the_server(servers):
    """It answers who waits with an error, says why, and leaves no process behind."""
    server, errors = servers[1], []

    def wait():
        try:
            client(server).completions.create(
                model="tiny", prompt=[5] * 200, max_tokens=50, n=64, extra_body={"ignore_eos": True}
            )
        except openai.APIError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    until(lambda: busy(server))
    server.engine_core().kill()
    waiting.join(PATIENCE)
    assert errors
    assert not isinstance(errors[0], openai.APITimeoutError)
    server.process.wait(PATIENCE)
    assert "EngineDeadError" in server.said()
    assert not server.left()


def test_sigterm_ends_the_server(server):
    """The last test of this server, which answers first, as --shutdown-timeout says: without it, vLLM 0.32 waits
    for the client to hang up."""
    with ask(server, new=200, stream=True) as stream:
        parts = iter(stream)
        next(parts)
        assert server.stop() == 0
        assert sum(len(part.choices[0].model_extra.get("token_ids") or []) for part in parts) == 200
    assert not server.left()
