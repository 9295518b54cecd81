"""Quantized models on disk: a transformers folder whose safetensors hold torchao's flattened names (`a.b._weight_qdata`,
`a.b._weight_scale`) and, as JSON metadata, each tensor's format. transformers itself reads it back where `rtn_tensor` is imported.
"""

import os
import shutil
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from torchao.quantization import FqnToConfig

from rtn_tensor.config import RTNConfig
from rtn_tensor.tensor import RTNQuantizedTensor

# torchao's reader and writer accept the classes in these two, and offer no function to add one. They need numpy, as safetensors and
# transformers do, but torch does not.
if find_spec("numpy") is not None:
    from torchao.prototype.safetensors import safetensors_utils

    safetensors_utils.ALLOWED_TENSORS_SUBCLASSES.append(RTNQuantizedTensor.__name__)
    safetensors_utils.ALLOWED_CLASSES[RTNQuantizedTensor.__name__] = RTNQuantizedTensor

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json")


def _quantization_config(model: nn.Module) -> Any:
    """The `TorchAoConfig` that describes the quantized `model`, or None for a float one."""
    from transformers import TorchAoConfig

    configs: OrderedDict[str, Any] = OrderedDict()
    floats: list[str] = []
    for fqn, w in model.named_parameters(remove_duplicate=False):
        # torchao names a module for its "weight", and any other parameter by its own name.
        key = fqn.removesuffix(".weight")
        if isinstance(w, RTNQuantizedTensor):
            configs[key] = RTNConfig(w.bits, w.group_size, w.scale_method)
        elif isinstance(model.get_submodule(fqn.rpartition(".")[0]), nn.Linear | nn.Embedding) and w.dim() > 1:
            floats.append(key)
    if not configs:
        return None
    distinct = set(configs.values())
    quant_type = distinct.pop() if len(distinct) == 1 else FqnToConfig(configs)
    embedding = isinstance(model.get_input_embeddings().weight, RTNQuantizedTensor)  # type: ignore[operator]
    return TorchAoConfig(quant_type, modules_to_not_convert=floats, include_input_output_embeddings=embedding)


def _is_untied(model: Any) -> bool:
    """Whether just one of the input embedding and the output layer is quantized, or they are, but apart."""
    ends = [end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    return len(ends) == 2 and ends[0] is not ends[1] and any(isinstance(w, RTNQuantizedTensor) for w in ends)


def _set(settings: list[tuple[Any, str, Any]]) -> None:
    """Sets attributes, or removes those whose value is None: transformers asks whether they are there."""
    for owner, name, value in settings:
        if value is not None:
            setattr(owner, name, value)
        elif name in vars(owner):
            delattr(owner, name)


def save_pretrained(model: Any, path: str | os.PathLike) -> None:
    """Writes a transformers `model`, quantized or not, as a folder that `load_pretrained` and transformers read back bit for bit.

    It is written under a temporary name beside `path` and renamed at the end, so a folder named `path` is always whole.

    Raises:
        FileExistsError: there is something at `path`.
    """
    from transformers.integrations.torchao import TorchAoDeserialize
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    class Quantizer(TorchAoHfQuantizer):
        def get_state_dict_and_metadata(self, model: Any) -> tuple[dict, dict]:
            # torchao would write a tensor once for every place that shares it.
            tensors, metadata = super().get_state_dict_and_metadata(model)
            names: dict[int, str] = {}
            for fqn, w in model.named_parameters(remove_duplicate=False):
                if names.setdefault(id(w), fqn) != fqn and isinstance(w, RTNQuantizedTensor):
                    module, _, name = fqn.rpartition(".")
                    for plane in w.tensor_data_names:
                        del tensors[f"{module}._{name}_{plane}"]
            return tensors, metadata

    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another name, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    quantization_config = _quantization_config(model)
    quantizer = None if quantization_config is None else Quantizer(quantization_config, pre_quantized=True)
    settings: list[tuple[Any, str, Any]] = []
    if quantizer is not None or RTNConfig.__name__ in str(getattr(model.config, "quantization_config", "")):  # ours, and dequantized since
        settings += [(model, "hf_quantizer", quantizer), (model.config, "quantization_config", quantization_config)]
    # Of a model that was read quantized, transformers remembers how, and refuses to write it: it cannot go back that way.
    if conversions := getattr(model, "_weight_conversions", None):
        kept = [c for c in conversions if not any(isinstance(op, TorchAoDeserialize) for op in getattr(c, "operations", ()))]
        settings.append((model, "_weight_conversions", kept))
    if _is_untied(model):  # else whoever reads it ties them anew
        settings.append((model.config, "tie_word_embeddings", False))
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in settings]
    try:
        _set(settings)
        model.save_pretrained(partial)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _set(before)


def load_pretrained(path: str | os.PathLike) -> Any:
    """The transformers model, quantized or not, in the folder `path`, of its own class and dtype, in eval mode.

    Raises:
        FileNotFoundError: `path` is not a transformers folder.
        ValueError: a file of it is truncated or corrupt.
    """
    import transformers
    from safetensors import SafetensorError

    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} is not a model folder: it has no config.json")
    config = transformers.AutoConfig.from_pretrained(path)
    model_class = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    try:
        return model_class.from_pretrained(path, dtype="auto").eval()
    except SafetensorError as error:
        raise ValueError(f"{path}: a safetensors file cannot be read ({error}); copy or download it again") from error
