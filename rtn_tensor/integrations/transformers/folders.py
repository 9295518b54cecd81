"""The empty model that a folder of transformers or diffusers describes."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from rtn_tensor.checkpoint.files import read_json
from rtn_tensor.checkpoint.foreign.reading import check_method, configs_in, is_ours
from rtn_tensor.checkpoint.sources import sources
from rtn_tensor.formats import FLOAT_DTYPES
from rtn_tensor.integrations.diffusers import class_of, is_diffusers, keep_in_fp32

# Of a model that config.json describes: it is made before its weights are looked at.
MOST_PARAMETERS, MOST_LAYERS = 200_000, 10_000


def read_config(path: Path) -> dict[str, Any]:
    """A transformers folder's config.json, of a model whose weights are float, ours or in a format that is
    read, and which runs no code of the folder's.

    Raises:
        FileNotFoundError, ValueError: it cannot be read, or is of another kind of model.
    """
    config = read_json(file := path / "config.json")
    for key, how in configs_in(config):
        check_method(how, str(file), key)
    for about in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key in (
            "attn_implementation",
            "_attn_implementation",
            "experts_implementation",
            "_experts_implementation",
        ):
            if "/" in str(about.get(key)):
                raise ValueError(
                    f"{file}: {key} is {str(about[key])[:100]!r}, code from elsewhere, which is "
                    "not run; remove that line"
                )
        for key, value in about.items():
            if key.endswith(("layers", "n_layer")) and type(value) is int and value > MOST_LAYERS:
                raise ValueError(f"{file}: {key} is {value}, more than any model has; mend or replace it")
    return config


@contextmanager
def parameters_on_meta(at_most: int | None = None) -> Iterator[None]:
    """Modules made here have their parameters on meta; their buffers, which a checkpoint need not hold, are
    real.

    Raises:
        ValueError: there are more parameters than `at_most`.
    """
    made = 0

    # torch's annotation forgets the parameter.
    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        nonlocal made
        made += 1
        if at_most is not None and made > at_most:
            raise ValueError(f"it has more than {at_most} parameters, more than any model")
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        hook.remove()


def _class(path: Path, about: Mapping[str, Any]) -> Any:
    """transformers' class of the model that a folder's config.json describes."""
    import transformers

    file, names = path / "config.json", about.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ValueError(
            f"{file}: architectures is {str(names)[:100]}; it must be a list with the name of "
            "transformers' class"
        )
    kind = getattr(transformers, names[0], None)
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    if about.get("auto_map"):
        raise _own_code(file, names[0])
    raise ValueError(
        f"{path}: transformers has no class {names[0]}, which config.json names; give the model to fill"
    )


def _forget_quantization(config: Any) -> None:
    """Removes what `config` and those of its parts say of another library's quantization, which is undone as
    the weights are read; null and {}, too, as transformers asks only whether it is there."""
    for about in (config, *(part for part in vars(config).values() if hasattr(part, "to_dict"))):
        for key in ("quantization_config", "compression_config"):
            vars(about).pop(key, None)


def _own_code(file: Path, what: str) -> ValueError:
    return ValueError(
        f"{file}: {what} is code of the folder's own (auto_map), which is never run here; read it, "
        "and make the model yourself: "
        "AutoModel.from_config(config, trust_remote_code=True), and load(path, model=it)"
    )


@contextmanager
def of_library(file: Path, what: str, library: str = "transformers") -> Iterator[None]:
    """Names the file from which a library makes `what`: it raises errors of any kind, and names none."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise _own_code(file, f"its {what}") from error
        why = " ".join(str(error).split()) or "no reason is given"
        raise ValueError(
            f"{file}: {library} makes no {what} of it ({type(error).__name__}: {why[:500]}); "
            "mend or replace it"
        ) from error


def made(file: Path, make: Callable[[], Any], dtype: torch.dtype, library: str = "transformers") -> Any:
    """The model of `dtype` that `make`, a function of `library`, makes of what `file` says, with its
    parameters on meta.

    Raises:
        ValueError: it makes none.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with of_library(file, "model", library), parameters_on_meta(MOST_PARAMETERS):
            model = make()
    finally:
        torch.set_default_dtype(before)
    if is_diffusers(model):
        keep_in_fp32(model, dtype)
        return model
    # fp16 is too narrow for some layers (T5's `wo`).
    for pattern, kept in model._get_dtype_plan(dtype).items():
        for name, parameter in model.named_parameters():
            if re.search(pattern.replace(".", r"\.").replace("*", ".*"), name):
                parameter.data = parameter.data.to(kept)
    model.config.dtype = dtype
    return model


def build(path: Path, dtype: torch.dtype) -> nn.Module:
    """The model that `path`/config.json describes, of its own class, with its parameters on meta.

    Raises:
        FileNotFoundError, ValueError: that file cannot be read; its class is not one of transformers', or its
            weights are of another library's format.
    """
    about = read_config(path)
    if "_class_name" in about:
        kind = class_of(path, about)
        own = {key: value for key, value in about.items() if key != "quantization_config"}
        return made(path / "config.json", lambda: kind.from_config(own), dtype, "diffusers").eval()
    import transformers

    kind = _class(path, about)

    def make() -> Any:
        config: Any = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        if not any(is_ours(how) for _, how in configs_in(about)):
            _forget_quantization(config)
        return kind(config)

    model = made(path / "config.json", make, dtype)
    model.name_or_path = str(path)
    file = path / "generation_config.json"
    if model.can_generate() and (file.exists() or file.is_symlink()):
        read_json(file)
        with of_library(file, "generation config"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model.eval()


def check_model_folder(path: Path) -> None:
    """Raises FileNotFoundError, which says what there is instead, unless `path` is a transformers folder."""
    if not ((path / "config.json").exists() or (path / "config.json").is_symlink()):
        there = (
            "it is a GGUF file; load() reads it, and save() or export() writes of that what this reads"
            if path.is_file() and path.suffix == ".gguf"
            else "it is a file; give the folder that it lies in, or to load() the module to fill, as model="
            if path.is_file()
            else "it holds an adapter; merge that into its model, and give the folder of that"
            if (path / "adapter_config.json").exists()
            else "it is a pipeline of diffusers; give the folder of one of its models, as transformer or unet"
            if (path / "model_index.json").exists()
            else "it has no config.json; add its model's, or give load() the module to fill, as model="
            if path.exists()
            else "it is not there; a model of the hub has a name as in Qwen/Qwen3-0.6B"
        )
        raise FileNotFoundError(f"{path} is not a model folder: {there}")


def empty_model(path: str | os.PathLike, dtype: torch.dtype | None = None) -> Any:
    """The model of a transformers folder, in eval mode, its parameters on meta; by default of the dtype that
    config.json names, or else the checkpoint has.

    Raises:
        FileNotFoundError: `path` is not such a folder.
        TypeError: `dtype` is not a float one.
        ValueError: its config.json cannot be read; its class is not one of transformers'; another library
            quantized it.
    """
    path, floats = Path(path), (*FLOAT_DTYPES, torch.float64)
    if dtype not in (None, *floats):
        raise TypeError(f"dtype is {dtype}; a model has one of {', '.join(map(str, floats))}")
    check_model_folder(path)
    if dtype is None:
        about = read_config(path)
        named = str(about.get("dtype") or about.get("torch_dtype")).removeprefix("torch.")
        dtype = next((dtype for dtype in floats if str(dtype) == f"torch.{named}"), None)
    if dtype is None:
        dtype = next(
            (source.dtype for source in sources(path).values() if source.dtype in floats), torch.float32
        )
    return build(path, dtype)
