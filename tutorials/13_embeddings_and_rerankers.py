"""Quantize an embedding model and a reranker of sentence-transformers for search on a CPU.

python tutorials/13_embeddings_and_rerankers.py

It needs sentence-transformers: pip install sentence-transformers
"""

import tempfile
from pathlib import Path

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    TorchAoConfig,
)

from rtn_tensor import quantize_, refine_, rtn_int4, rtn_int8

torch.manual_seed(0)
texts = [
    "the valley was settled by farmers from the north",
    "a cell takes up sugar through its wall",
    "the council raised the tax on salt",
    "rivers carry silt to the sea",
]
query = "who settled the valley"


def tiny(folder):
    """Folders as SentenceTransformer("all-MiniLM-L6-v2") and CrossEncoder take them, but tiny and random."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *sorted({w for text in [*texts, query] for w in text.split()}),
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", model_max_length=64)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(words), num_labels=1, **sizes)
    for kind, name in ((BertModel, "embedder"), (BertForSequenceClassification, "reranker")):
        kind(config).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)


with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    tiny(folder)

    # An embedding model is a module as any other.
    model = SentenceTransformer(str(folder / "embedder"), device="cpu")
    expected = model.encode(texts, convert_to_tensor=True)
    quantize_(model, rtn_int8())
    found = model.encode(texts, convert_to_tensor=True)
    print(f"int8: cosine with the float embeddings {torch.cosine_similarity(expected, found).mean():.4f}")
    print(model.similarity(model.encode(query), found))

    # It is saved and read as ever; the folder has a quarter of the bytes of one in fp32.
    model.save_pretrained(str(folder / "int8"))
    again = SentenceTransformer(str(folder / "int8"), device="cpu")
    assert torch.equal(again.encode(texts, convert_to_tensor=True), found)

    # Or quantized while it is read. Products can round their activations to int8, too, which is faster.
    how = {"quantization_config": TorchAoConfig(rtn_int8(activations="int8"))}
    fast = SentenceTransformer(str(folder / "embedder"), device="cpu", model_kwargs=how)
    found = fast.encode(texts, convert_to_tensor=True)
    print(f"int8 both: {torch.cosine_similarity(expected, found).mean():.4f}")

    # Four bits are nearer to the float model where rounding errors make up for one another, over a few
    # hundred sentences of the kind that will be encoded.
    refined = SentenceTransformer(str(folder / "embedder"), device="cpu")
    batch = refined.tokenizer(texts, padding=True, return_tensors="pt")
    refine_(refined[0].auto_model, rtn_int4(), batches=[dict(batch)])
    found = refined.encode(texts, convert_to_tensor=True)
    print(f"int4 refined: {torch.cosine_similarity(expected, found).mean():.4f}")

    # A reranker scores pairs of a query and a text.
    reranker = CrossEncoder(str(folder / "reranker"), device="cpu")
    before = reranker.predict([(query, text) for text in texts])
    quantize_(reranker, rtn_int8())
    print("scores before and after:", before, reranker.predict([(query, text) for text in texts]))
