"""`print(model)` says which layers are quantized.

torchao binds another `extra_repr` to each module; such a module cannot be pickled, holds itself alive, and
says so still when its weight has been replaced. So here the three classes that all layers with quantized
weights are of ask their parameters, whoever put them there.
"""

import functools

import torch
from torch import nn

from rtn_tensor.distributed import held
from rtn_tensor.tensor import RTNQuantizedTensor


def _with_quantized(extra_repr):
    @functools.wraps(extra_repr)
    def with_quantized(self: nn.Module) -> str:
        text = extra_repr(self)
        # torch.vmap asks for the text of what it maps, and a compiler would trace it.
        if torch.compiler.is_compiling():
            return text
        weights = {name: held(parameter) for name, parameter in self._parameters.items()}
        shown = [
            f"{name}={type(w).__name__}({w._quantization_type()})"
            for name, w in weights.items()
            if isinstance(w, RTNQuantizedTensor) and f"{name}=" not in text
        ]
        return ", ".join([*([text] if text else []), *shown])

    return with_quantized


for _class in (nn.Module, nn.Linear, nn.Embedding):
    _class.extra_repr = _with_quantized(_class.extra_repr)
