"""What of a model's folder goes with its weights into another, and what does not."""

import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from rtn_tensor.checkpoint.files import check_regular, parse_json

# What of a model's folder does not go with its quantized weights into another, by lower-case name, and why.
LEFT_OUT = (
    (("adapter_*",), "an adapter, which is not merged into the weights"),
    (
        (
            "optimizer.*",
            "scheduler.*",
            "rng_state*",
            "scaler.*",
            "training_args.*",
            "trainer_state.json",
            "*.distcp",
            "*.tfevents.*",
        ),
        "of a training run",
    ),
    (
        ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.index.json"),
        "weights that are not quantized",
    ),
    (
        (
            "*.h5",
            "*.msgpack",
            "*.ot",
            "*.onnx",
            "*.onnx_data",
            "*.onnx.data",
            "*.tflite",
            "*.mlmodel",
            "*.pdparams",
            "*.nemo",
        ),
        "another framework's weights, which are not quantized",
    ),
    (
        ("quantize_config.json", "quant_config.json", "hf_quant_config.json"),
        "it describes another quantization",
    ),
    ((".*",), "hidden"),
)


def companions(source: Path) -> tuple[list[Path], dict[Path, str]]:
    """The files of a transformers folder that go with its weights into another: tokenizer, processors,
    templates, sentence-transformers' modules, license, card; and the entries of it that do not, each with the
    reason."""
    folders = companion_folders(source)
    kept = [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
    left_out: dict[Path, str] = {}
    for entry in sorted(source.iterdir()):
        why = next(
            (why for patterns, why in LEFT_OUT if any(fnmatchcase(entry.name.lower(), p) for p in patterns)),
            None,
        )
        if entry.is_dir():
            if entry not in folders:
                left_out[entry] = (
                    "neither modules.json names it nor does it hold a tokenizer, a processor or templates "
                    "alone"
                )
        elif not entry.is_file():
            left_out[entry] = "it is no file"
        elif why:
            left_out[entry] = why
        else:
            kept.append(entry)
    return kept, left_out


def copy_companions(files: Iterable[Path], source: Path, folder: Path) -> None:
    """Copies `files` of `source` to where they lie in `folder`, but for those that it has of its own."""
    for file in files:
        to = folder / file.relative_to(source)
        if not to.exists():
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to)


def companion_folders(source: Path) -> list[Path]:
    """sentence-transformers' modules, some with weights of their own; and tokenizers, processors and chat
    templates, which have none."""
    modules, file = [], source / "modules.json"
    if file.exists():
        check_regular(file)
        try:
            modules = parse_json(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{file} is no JSON ({error}); copy or download it again") from None
    listed = (
        [module.get("path") for module in modules if isinstance(module, dict)]
        if isinstance(modules, list)
        else []
    )
    names = {"additional_chat_templates", *(path.split("/")[0] for path in listed if isinstance(path, str))}
    folders = [
        entry for entry in sorted(source.iterdir()) if entry.is_dir() and not entry.name.startswith(".")
    ]
    return [folder for folder in folders if folder.name in names or _is_processor(folder)]


def _is_processor(folder: Path) -> bool:
    names = {file.name for file in folder.iterdir()}
    if not names & {"tokenizer_config.json", "preprocessor_config.json", "processor_config.json"}:
        return False
    return not any(
        fnmatchcase(name.lower(), pattern)
        for name in names
        for patterns, _ in LEFT_OUT
        for pattern in patterns
    )
