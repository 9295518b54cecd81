"""Savers of other libraries: diffusers and sentence-transformers, and what one that writes safetensors by
itself is told."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizerFast

from rtn_tensor import RTNQuantizedTensor, quantize_, rtn_int4

WAY_OUT = "safe_serialization=False where the library that saves takes that"


class Saves(nn.Module):
    """As sentence-transformers' Dense saves."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 32)

    def save_pretrained(self, folder, safe_serialization=True):
        if safe_serialization:
            save_file(self.state_dict(), folder / "model.safetensors")
        else:
            torch.save(self.state_dict(), folder / "model.bin")


def test_a_library_that_saves_by_itself(tmp_path):
    model, x = Saves(), torch.randn(3, 64)
    quantize_(model, rtn_int4(32))
    with pytest.raises(TypeError, match=rf"linear.weight: .*{WAY_OUT}"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, safe_serialization=False)
    other = Saves()
    other.load_state_dict(torch.load(tmp_path / "model.bin", weights_only=True), assign=True)
    assert isinstance(other.linear.weight, RTNQuantizedTensor)
    assert torch.equal(other.linear(x), model.linear(x))


def unet(diffusers):
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    ), (torch.randn(1, 4, 8, 8), 1, torch.randn(1, 3, 32))


def transformer(diffusers):
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=10,
    ), (torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.tensor([1]))


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("make", [unet, transformer])
def test_diffusers(tmp_path, make, safe):
    model, inputs = make(pytest.importorskip("diffusers"))
    quantize_(model.eval(), rtn_int4(32))
    model.save_pretrained(tmp_path / "model", safe_serialization=safe)
    read = type(model).from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    kinds = {name: type(p) for name, p in model.named_parameters()}
    assert {name: type(p) for name, p in read.named_parameters()} == kinds
    with torch.no_grad():
        assert torch.equal(read(*inputs).sample, model(*inputs).sample)


@pytest.mark.parametrize("dense", [False, True])
def test_sentence_transformers(tmp_path, dense):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "hello", "world"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    parts = [modules.Transformer(str(tmp_path / "bert")), modules.Pooling(32)]
    model = library.SentenceTransformer(modules=parts + [modules.Dense(32, 32)] * dense)
    quantize_(model, rtn_int4(32))
    texts = ["hello world", "a b"]
    expected = torch.from_numpy(model.encode(texts))
    if dense:
        with pytest.raises(TypeError, match=WAY_OUT):
            model.save(str(tmp_path / "model"))
    model.save(str(tmp_path / "model"), safe_serialization=not dense)
    read = library.SentenceTransformer(str(tmp_path / "model"))
    assert any(isinstance(p, RTNQuantizedTensor) for p in read[0].parameters())
    torch.testing.assert_close(torch.from_numpy(read.encode(texts)), expected)
