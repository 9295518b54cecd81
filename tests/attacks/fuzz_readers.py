"""A fuzz target for the readers: any bytes, taken for a file, are read or refused.

    pip install atheris && PYTHONPATH=.:tests/attacks python tests/attacks/fuzz_readers.py CORPUS_FOLDER

The first byte says what the rest is taken for: safetensors, an index, a config, or a file of torch.save.
"""

import os
import sys
import tempfile
from pathlib import Path

from rtn_tensor.checkpoint.files import read_json, weight_files
from rtn_tensor.checkpoint.sources import sources
from rtn_tensor.integrations.transformers.folders import read_config

KINDS = ("x.safetensors", "model.safetensors.index.json", "config.json", "x.pt")


def fuzz(data: bytes) -> str:
    """What became of it: the name of an error's class, or "read".

    Raises:
        Exception: what a reader must never raise.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        file = Path(folder) / KINDS[data[0] % len(KINDS) if data else 0]
        file.write_bytes(data[1:])
        try:
            if file.name == "config.json":
                read_config(Path(folder))
            elif file.suffix == ".json":
                read_json(file)
                weight_files(Path(folder))
            else:
                for source in sources(file).values():
                    source.private()
                    source.view()
        except (ValueError, FileNotFoundError) as error:
            # As a JSONDecodeError, which names no file.
            if type(error) not in (ValueError, FileNotFoundError) or folder not in str(error):
                raise
            return type(error).__name__
    return "read"


if __name__ == "__main__":
    import atheris  # type: ignore[import-not-found]

    atheris.Setup(sys.argv, fuzz)
    atheris.Fuzz()
