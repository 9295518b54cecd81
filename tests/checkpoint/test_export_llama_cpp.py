"""What `export` writes as GGUF, run by llama.cpp itself, where xllamacpp brings it."""

import pytest
import torch

from benchmarks.downloads import ModelUnavailable
from benchmarks.real_data import state_of_the_union
from benchmarks.real_model import smollm2, smollm2_gguf
from rtn_tensor import export, load, rtn_int4, rtn_int8

POSITIONS, LIKELIEST = range(8, 40), 500


@pytest.mark.slow
@pytest.mark.parametrize("config", [rtn_int4(32, "signed"), rtn_int8(-1)], ids=str)
def test_llama_cpp_predicts_what_the_model_does(tmp_path, config):
    """Its divergence is that of its own quantized models from their weights: it rounds activations to 8 bits a
    block. Between the int4 and the float model it is 0.3."""
    xllamacpp = pytest.importorskip("xllamacpp")
    from transformers import AutoTokenizer

    try:
        folder, like, text = smollm2(), smollm2_gguf(), state_of_the_union()
    except ModelUnavailable as reason:
        pytest.skip(str(reason))
    model = load(folder, config).float()
    export(load(folder, config), tmp_path / "a.gguf", "gguf", like=like)
    ids = AutoTokenizer.from_pretrained(folder)(text[:1000])["input_ids"][: POSITIONS.stop]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    params = xllamacpp.CommonParams()
    params.model.path = str(tmp_path / "a.gguf")
    params.n_ctx = 128
    server = xllamacpp.Server(params)
    divergences = []
    for position in POSITIONS:
        asked = {"prompt": ids[:position], "max_tokens": 1, "temperature": 0, "logprobs": LIKELIEST}
        found = server.handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        tokens = torch.tensor([entry["id"] for entry in found])
        theirs = torch.tensor([entry["logprob"] for entry in found])
        ours = expected[position - 1][tokens]
        # All others are one.
        rest = [(1 - logs.double().exp().sum()).clamp(min=1e-9).log() for logs in (ours, theirs)]
        divergences.append(float((ours.exp() * (ours - theirs)).sum() + rest[0].exp() * (rest[0] - rest[1])))
    del server
    assert sum(divergences) / len(divergences) < 0.01
