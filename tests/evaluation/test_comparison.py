import copy
import math

import pytest
import torch
from tiny_llama import tiny_llama

from rtn_tensor import compare, quantize_, rtn_int4, rtn_int8
from rtn_tensor.evaluation.perplexity import perplexity


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def test_a_model_is_equal_to_itself(model):
    found = compare(model, model, torch.arange(100))
    assert found.divergence == pytest.approx(0, abs=1e-6)
    assert found.agreement == 1
    assert found.tokens == 99
    assert (
        found.perplexity == found.reference_perplexity == pytest.approx(perplexity(model, torch.arange(100)))
    )


def test_the_numbers(model):
    other = copy.deepcopy(model)
    quantize_(other, rtn_int4(32))
    ids = torch.randint(320, (1, 70))
    found = compare(other, model, ids, window=32)
    kl, same, losses = [], [], []
    with torch.no_grad():
        for part in ids[0].split(32):
            q, p = (
                m(part[None], use_cache=False).logits[0, :-1].double().softmax(-1) for m in (other, model)
            )
            kl.append((p * (p / q).log()).sum(-1))
            same.append(q.argmax(-1) == p.argmax(-1))
            losses.append(-q.log().gather(1, part[1:, None])[:, 0])
    assert found.tokens == 67
    assert found.divergence == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert found.agreement == pytest.approx(float(torch.cat(same).double().mean()))
    assert found.perplexity == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-4)
    assert str(found).startswith(
        f"divergence {found.divergence:.4f} nats per token, the same first token for "
    )


def test_fewer_bits_diverge_more(model):
    found = {}
    for config in (rtn_int8(32), rtn_int4(32)):
        other = copy.deepcopy(model)
        quantize_(other, config)
        found[config.bits] = compare(other, model, torch.arange(60), progress=list).divergence
    assert 0 < found[8] < found[4] / 10


def test_what_is_wrong_is_said(model):
    ids = torch.arange(10)
    other = copy.deepcopy(model)
    other.resize_token_embeddings(321)
    with pytest.raises(ValueError, match="320 and 321 tokens in their vocabularies"):
        compare(model, other, ids)
    with pytest.raises(ValueError, match="training mode"):
        compare(model, copy.deepcopy(model).train(), ids)
    with pytest.raises(ValueError, match="both must be at least 2"):
        compare(model, model, ids[:1])
    with pytest.raises(ValueError, match="token 320 is none of the 320"):
        compare(model, model, torch.tensor([1, 320]))
