"""The model card, README.md, of a quantized folder."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rtn_tensor.checkpoint.foreign.written import Engine
from rtn_tensor.formats import GIVEN, GIVEN_ASYMMETRIC
from rtn_tensor.tensor import RTNQuantizedTensor

# Of the card of the model that was quantized: what holds for the quantized one, too.
KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
RUN = {
    "vLLM": "```sh\nvllm serve PATH\n```",
    "SGLang": "```sh\npython -m sglang.launch_server --model-path PATH\n```",
    "transformers": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
written = model.generate(**tokenizer("Why is the sky blue?", return_tensors="pt"), max_new_tokens=32)
print(tokenizer.decode(written[0]))
```""",
}
RUN_OURS = {  # with this library installed
    "rtn-tensor": "```sh\nrtn-tensor chat PATH\n```",
    "vLLM": RUN["vLLM"],
    "transformers": RUN["transformers"].replace("python\n", "python\nimport rtn_tensor\n"),
}
EXPORTED = " The integers and scales are those of the model that was exported."
READ = """```python
from transformers import KIND

model = KIND.from_pretrained("PATH")
```"""  # by transformers, of a model that is no language model


def about_source(source: Path | None) -> dict[str, Any]:
    """What the card in the folder of the model that was quantized says of it that holds for the quantized
    one, too.

    Raises:
        ValueError: it has a header that cannot be read.
    """
    from huggingface_hub import metadata_load

    if source is None or not (file := source / "README.md").is_file():
        return {}
    try:
        found = metadata_load(file)
    except Exception as error:  # of YAML, or of the text's encoding
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{file}: its header cannot be read ({why}); mend or remove the file") from error
    if not isinstance(found, Mapping):
        return {}
    about = {key: found[key] for key in KEPT if key in found}
    if found.get("base_model_relation") == "quantized":  # as here
        about["base_model"] = found.get("base_model")
    return about


def card(
    name: str,
    kind: str,
    source: Path | None,
    base_model: str | None,
    format_name: str,
    formats: Sequence[str],
    bits_per_weight: float,
    engines: Sequence[Engine],
    changes: Sequence[str],
    run: Mapping[str, str] = RUN,
    origin: str = EXPORTED,
) -> str:
    """The text of README.md; `kind` is the name of the model's class, `formats` says what the weights are, as
    in "4 bits, group_size 64, search", `run`, by engine, how a language model is run, and
    `origin` where the integers are from."""
    from huggingface_hub import ModelCardData

    from rtn_tensor import __version__

    about = about_source(source)
    if base_model is not None:
        about["base_model"] = base_model
    if about.get("base_model"):
        about["base_model_relation"] = "quantized"
    header = ModelCardData(
        **about,
        library_name="transformers",
        tags=["quantized", format_name],
        quantized_by="rtn-tensor",
        quantization={
            "format": format_name,
            "weights": list(formats),
            "bits_per_weight": round(bits_per_weight, 3),
        },
    ).to_yaml()
    of = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "its float model"
    how_to = (
        dict(run) if kind.endswith("ForCausalLM") else {**run, "transformers": READ.replace("KIND", kind)}
    )
    shown = [
        f"### {engine.name}\n\n" + (f"Note: {engine.note}.\n\n" if engine.note else "") + how
        for engine in engines
        if engine.reads
        and (how := next((how for key, how in how_to.items() if engine.name.startswith(key)), None))
    ]
    line = "\n"
    return (
        f"""---
{header}
---

# {name}

The weights of {of}, quantized:

{"".join(f"- {text}{line}" for text in formats)}
All parameters together take {bits_per_weight:.2f} bits per weight.

## How to run it

PATH is this folder.

{"".join(f"{text}{line}{line}" for text in shown)}## How it was made

By rtn-tensor {__version__}, in the format {format_name}: each weight is an integer of few bits times
the scale of its group.{origin}
{"".join(f"{line}- {change}" for change in changes)}
""".rstrip()
        + line
    )


def in_words(w: RTNQuantizedTensor, group_size: int) -> str:
    """A weight's format, with the group size that it is written in."""
    given = w.scale_method in (GIVEN, GIVEN_ASYMMETRIC)
    scales = "scales of another library" if given else f"scale_method {w.scale_method!r}"
    return f"{w.bits} bits, group_size {group_size}, {scales}"


def own_card(model: Any, name: str, source: Path, base_model: str | None, bits_per_weight: float) -> str:
    """The card of a folder as `save` writes it."""
    found = Counter(
        in_words(w, w.group_size) + (f", {w.activations} activations" if w.activations else "")
        for w in model.parameters()
        if isinstance(w, RTNQuantizedTensor)
    )
    formats = [f"{text} ({count} weights)" for text, count in found.items()]
    engines = [Engine(engine, True, "with rtn-tensor installed") for engine in RUN_OURS]
    kind = type(model).__name__
    return card(name, kind, source, base_model, "rtn", formats, bits_per_weight, engines, [], RUN_OURS, "")
