"""Models that are named as on the Hugging Face hub."""

import os
import re
from pathlib import Path

NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:@([\w./-]+?))?(?:/([\w./-]+\.gguf))?")
OTHERS = ["*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.gguf", "onnx/*", "original/*"]
IN_PICKLES = "*.bin"  # fetched where there is no safetensors file


def local(path: str | os.PathLike) -> Path:
    """The folder or file of a model: `path`, or what huggingface_hub has of it in its cache, where `path` is
    none here but a name on the hub: "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B@main" with a branch, tag or commit,
    or "Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf".

    What is missing there is downloaded, weights of other frameworks left out. The environment says the rest,
    as to all that uses huggingface_hub: HF_HOME, HF_TOKEN (or `hf auth login`), HF_ENDPOINT, HF_HUB_OFFLINE.

    Raises:
        FileNotFoundError: it is not on the hub, or not in the cache and the hub cannot be reached.
    """
    text = os.fspath(path)
    if os.path.lexists(text) or not (name := NAME.fullmatch(text)):
        return Path(text)
    from huggingface_hub import hf_hub_download, snapshot_download

    repository, revision, file = name.groups()
    try:
        if file:
            return Path(hf_hub_download(repository, file, revision=revision))
        folder = Path(snapshot_download(repository, revision=revision, ignore_patterns=[*OTHERS, IN_PICKLES]))
        if not any(folder.rglob("*.safetensors")):
            folder = Path(snapshot_download(repository, revision=revision, ignore_patterns=OTHERS))
        return folder
    except Exception as error:  # also of the HTTP library below it, which is another by version
        why = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"{text} is neither here nor to be had from the hub ({why}); check the name, the network, and "
            "(of a private or gated model) `hf auth login`"
        ) from error
