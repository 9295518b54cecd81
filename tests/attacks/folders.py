"""Saved folders to lie about, and the readers that are to see it."""

import json
import struct
import warnings

import torch
from torch import nn

from rtn_tensor import RTNQuantizedTensor, load, quantize_, rtn_int4, rtn_int8, save

QUANTIZED = "1.weight"


def make():
    """A module with an embedding, a quantized weight, and a bias of an odd size."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 96), nn.Linear(96, 33), nn.Linear(33, 64, bias=False))


def quantized(bits=4, **kwargs):
    model = make()
    quantize_(model, (rtn_int4 if bits == 4 else rtn_int8)(32, **kwargs), lambda module, fqn: fqn == "1")
    return model


def saved(folder, **kwargs):
    """The folder of a quantized module, and its file."""
    save(quantized(**kwargs), folder)
    return folder / "model.safetensors"


def parts(file):
    """A safetensors file's header, and the bytes after it."""
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def put(file, header, data=b""):
    """Writes a safetensors file of a header: JSON, or its text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read(path):
    """Loads a checkpoint of `make`, runs it, and gives whether what came out was finite."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(path, model=make)
        assert isinstance(model[1].weight, RTNQuantizedTensor)
        with torch.no_grad():
            return model(torch.arange(5)).isfinite().all().item()
