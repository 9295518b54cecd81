"""What vLLM does beside plain decoding: with quantized weights it gives the tokens that it gives without it."""

import json
import subprocess
import sys

import pytest
import torch
from engine import ROUNDING, difference, engine, greedy, rtn
from vllm_models import HERE, reference

from rtn_tensor import rtn_int4

OPTIONS = rtn(bits=4, group_size=64)
LONG = [[(7 * i * i + 3 * i) % 300 + 5 for i in range(90)], [11, 12, 13, 14] * 12]


@pytest.fixture(scope="module")
def expected(folder):
    """The model in transformers, by the same quantized weights."""
    return reference(folder("llama"), rtn_int4(64, "absmax"))


def assert_as_expected(model, generated):
    assert difference(model, generated, LONG) < ROUNDING["float32"]


def test_prefix_caching_and_chunked_prefill(folder, expected):
    with engine(folder("llama"), enable_prefix_caching=True, max_num_batched_tokens=32, **OPTIONS) as llm:
        first, again = greedy(llm, LONG), greedy(llm, LONG)  # the second time out of the cache
    assert_as_expected(expected, first)
    assert_as_expected(expected, again)


def test_speculative_decoding_by_a_draft(folder, expected):
    """A draft of the same weights, quantized, too."""
    draft = {"method": "draft_model", "model": str(folder("llama")), "quantization": "rtn"}
    with engine(folder("llama"), speculative_config=draft | {"num_speculative_tokens": 3}, **OPTIONS) as llm:
        assert_as_expected(expected, greedy(llm, LONG))


def test_speculative_decoding_by_ngrams(folder, expected):
    """In a process of its own: numba, which it loads, breaks vLLM's start of a second engine in one."""
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    program = f"""
import json
from engine import engine, greedy
with engine({str(folder("llama"))!r}, speculative_config={ngram}, **{OPTIONS}) as llm:
    print("\\n" + json.dumps(greedy(llm, {LONG})))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_as_expected(expected, json.loads(done.stdout.splitlines()[-1]))


def test_structured_output(folder):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    with engine(folder("llama"), **OPTIONS) as llm:
        choice = StructuredOutputsParams(choice=["yes", "no"])
        sampling = SamplingParams(temperature=0, max_tokens=8, structured_outputs=choice)
        outputs = llm.generate(["is it?"], sampling, use_tqdm=False)
    assert outputs[0].outputs[0].text in ("yes", "no")


def test_embeddings(folder, expected):
    """The last token's hidden state, normalized, as vLLM makes an embedding model of a decoder."""
    with engine(folder("llama"), runner="pooling", convert="embed", **OPTIONS) as llm:
        outputs = llm.embed([{"prompt_token_ids": ids} for ids in LONG], use_tqdm=False)
    with torch.no_grad():
        for ids, output in zip(LONG, outputs, strict=True):
            hidden = expected.model(torch.tensor([ids])).last_hidden_state[0, -1]
            cosine = torch.cosine_similarity(hidden, torch.tensor(output.outputs.embedding), dim=0)
            assert cosine > 0.9999


def test_a_rule_for_one_pipeline_stage(folder):
    """Each stage has only some layers. vLLM 0.32 cannot run a second stage on a CPU, float models neither, so
    that loading alone is looked at."""
    stages = {"pipeline_parallel_size": 2, "tensor_parallel_size": 1}

    def said(pattern):
        options = rtn(bits=4, group_size=64, rules=[[pattern, {"bits": 8}]])
        case = [[str(folder("llama")), stages | options]]
        command = [sys.executable, str(HERE / "ranks.py"), json.dumps(case)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
        return done.stdout + done.stderr

    text = said("*.0.*down_proj")
    assert "rtn: 3 int4 g64, 1 int8 g64;" in text
    assert "rtn: 4 int4 g64;" in text
    assert "no layer matches" not in text
    assert "no layer matches '*.7.*down_proj'" in said("*.7.*down_proj")
