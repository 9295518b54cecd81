"""Embedding models and rerankers of sentence-transformers, quantized and read by it."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, TorchAoConfig

sentence_transformers = pytest.importorskip("sentence_transformers")

from sentence_transformers import CrossEncoder, SentenceTransformer  # noqa: E402

from rtn_tensor import RTNQuantizedTensor, load, quantize_, rtn_int4, rtn_int8, save  # noqa: E402
from rtn_tensor.cli import main  # noqa: E402

TEXTS = ["one two three", "four", "five six"]
PAIRS = [("one two", text) for text in TEXTS]


def with_tokenizer(model, folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "one", "two", "three", "four", "five", "six"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", model_max_length=64
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config():
    torch.manual_seed(0)
    return BertConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_labels=1,
    )


@pytest.fixture
def embedder(config, tmp_path):
    """A folder that sentence-transformers wrote, with its pooling."""
    plain = with_tokenizer(BertModel(config), tmp_path / "plain")
    SentenceTransformer(plain, device="cpu").save_pretrained(str(tmp_path / "float"))
    return tmp_path / "float"


@pytest.fixture
def reranker(config, tmp_path):
    return with_tokenizer(BertForSequenceClassification(config), tmp_path / "reranker")


def read(folder, **kwargs):
    return SentenceTransformer(str(folder), device="cpu", **kwargs)


def encode(model):
    return model.encode(TEXTS, convert_to_tensor=True)


def quantized(model):
    return sum(isinstance(w, RTNQuantizedTensor) for w in model.parameters())


def test_in_memory_and_saved(embedder, tmp_path):
    model = read(embedder)
    expected = encode(model)
    quantize_(model, rtn_int8(32))
    found = encode(model)
    assert not torch.equal(found, expected)
    assert torch.cosine_similarity(found, expected).min() > 0.999
    model.save_pretrained(str(tmp_path / "saved"))
    again = read(tmp_path / "saved")
    assert quantized(again) == quantized(model) == 7
    assert torch.equal(encode(again), found)


def test_quantized_as_it_is_read(embedder):
    model = read(embedder)
    quantize_(model, rtn_int4(32))
    config = TorchAoConfig(rtn_int4(32))
    assert torch.equal(encode(read(embedder, model_kwargs={"quantization_config": config})), encode(model))


def test_by_the_command_line_and_by_save(embedder, tmp_path):
    """The pooling and what else stands beside the weights comes along."""
    assert main(["quantize", str(embedder), str(tmp_path / "out"), "--bits", "8", "--group-size", "32"]) == 0
    model = read(embedder)
    quantize_(model, rtn_int8(32))
    found = read(tmp_path / "out")
    assert [type(part) for part in found] == [type(part) for part in model]
    assert torch.equal(encode(found), encode(model))
    save(found, tmp_path / "by save")
    fresh = load(tmp_path / "by save", model=read(embedder))
    assert torch.equal(encode(fresh), encode(model))


def test_reranker(reranker, tmp_path):
    model = CrossEncoder(reranker, device="cpu")
    expected = model.predict(PAIRS)
    quantize_(model, rtn_int8(32))
    found = model.predict(PAIRS)
    assert abs(found - expected).max() < 0.01
    model.save_pretrained(str(tmp_path / "saved"))
    again = CrossEncoder(str(tmp_path / "saved"), device="cpu")
    assert quantized(again) == quantized(model) > 0
    assert (again.predict(PAIRS) == found).all()
