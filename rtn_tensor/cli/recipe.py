"""Recipes: files that say how a model was, or is to be, quantized."""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rtn_tensor.cli.models import read_text
from rtn_tensor.config import RTNConfig

FILE = "rtn_recipe.yaml"  # beside the weights
OF_FORMAT = (
    "bits",
    "scheme",
    "group_size",
    "scale_method",
    "activations",
    "skip",
    "rule",
    "embedding",
    "language_model_only",
    "bits_per_weight",
)  # options that ask for a format
KEYS = (*OF_FORMAT, "refine", "format")  # of a recipe, each as the option of its name


def written(
    args: argparse.Namespace, rules: Sequence[tuple[str, RTNConfig | None]], rest: RTNConfig | None
) -> str:
    """The recipe that does again what `args` did, `rules` being those of the file that --rules named, and
    `rest` the format of what no rule names, whose defaults are written out: a later release may have others.
    """
    import yaml

    about: dict[str, Any] = {key: value for key in KEYS if (value := getattr(args, key))}
    if rest is not None and not args.bits_per_weight:
        about = {"bits": rest.bits, "group_size": rest.group_size, "scale_method": rest.scale_method} | about
        if args.scheme:
            del about["bits"]
    if rules:
        about["rule"] = [*about.get("rule", []), *(as_text(pattern, config) for pattern, config in rules)]
    said = "# rtn-tensor quantize SRC DST --recipe FILE does this again."
    return f"{said}\n{yaml.safe_dump(about, sort_keys=False) if about else '{}'}"


def as_text(pattern: str, config: RTNConfig | None) -> str:
    """A rule, as --rule takes it."""
    if config is None:
        return f"{pattern}=float"
    values = config.bits, config.group_size, config.scale_method, config.activations
    return f"{pattern}={','.join(str(value) for value in values if value is not None)}"


def arguments(path: str) -> list[str]:
    """What a recipe, YAML or JSON, says, as arguments of `quantize`.

    Raises:
        ValueError: it is no recipe; the message names the file, and the key.
    """
    import yaml

    text = read_text(path, "--recipe takes a YAML or JSON file")
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {str(found)[:80]!r}; a recipe has lines as in 'bits: 4'")
    given = []
    for key, value in found.items():
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; it may have {', '.join(KEYS)}"
            raise ValueError(f"{path}: {key!r} is no key of a recipe{hint}")
        option = f"--{key.replace('_', '-')}"
        if value is True:
            given.append(option)
        elif value is not None and value is not False:
            values = value if isinstance(value, list) else [value]
            if not all(isinstance(each, str | int | float) for each in values):
                raise ValueError(f"{path}: {key} is {str(value)[:80]!r}; write it as the option {option}")
            given += [f"{option}={each}" for each in values]
    return given


def beside(place: Path, text: str) -> None:
    """Writes a recipe into the folder `place`."""
    (place / FILE).write_text(text, encoding="utf-8")
