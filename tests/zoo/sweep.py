"""A tiny random model of every architecture of transformers, through everything that the product does with a
model. `PYTHONPATH=tests python -m zoo.sweep` tries all and writes the list that the test goes by, and what
docs/models.md says of it; names of model types after it try those alone."""

import copy
import json
import re
import sys
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.models.auto import configuration_auto, modeling_auto
from zoo.inputs import numbers, required, trials
from zoo.tiny_configs import tiny

from rtn_tensor import RTNQuantizedTensor, dequantize_, load, quantize_, rtn_int4, save

LIST = Path(__file__).with_name("transformers.jsonl")
DIFFUSION = Path(__file__).with_name("diffusers.jsonl")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
CONFIG = rtn_int4(group_size=32)
LARGE = 1024  # the elements of a weight that may not stay float without a reason
MOST = 5e7  # the parameters of what is still tiny

# ------------------------------------------------------------------------------- which models

FIRST = [
    *("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "CAUSAL_LM", "CTC"),
    *("MASKED_LM", "TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM", "ZERO_SHOT_OBJECT_DETECTION"),
    *("OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION", "INSTANCE_SEGMENTATION", "IMAGE_CLASSIFICATION"),
    *("SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION"),
    *("RNNT", "TDT", "MODEL"),
]


CLASSES = {
    "shieldgemma2": "ShieldGemma2ForImageClassification",
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
}


def classes() -> dict[str, list[str]]:
    """By model type, of one for each folder of transformers, the classes to try, the likeliest first."""
    others = [n[10:-14] for n in dir(modeling_auto) if re.fullmatch("MODEL_FOR_.*_MAPPING_NAMES", n)]
    tables = {n: getattr(modeling_auto, f"MODEL_FOR_{n}_MAPPING_NAMES") for n in others}
    tables["MODEL"] = modeling_auto.MODEL_MAPPING_NAMES
    folders: dict[str, tuple[int, str, list[str]]] = {}
    for kind in configuration_auto.CONFIG_MAPPING_NAMES:
        found = [tables[n][kind] for n in dict.fromkeys([*FIRST, *sorted(tables)]) if kind in tables[n]]
        if not found:
            continue
        names = list(dict.fromkeys(n if isinstance(n, str) else n[0] for n in found))
        rank = next((i for i, n in enumerate(FIRST) if kind in tables[n]), len(FIRST))
        folder = configuration_auto.model_type_to_module_name(kind)
        if folder not in folders or rank < folders[folder][0]:
            folders[folder] = rank, kind, names
    # Where the tables name a class of another type, or a part.
    for kind, name in CLASSES.items():
        folder = configuration_auto.model_type_to_module_name(kind)
        folders[folder] = 0, kind, [name]
    plain = {kind: [n for n in names if n.endswith("Model")][:1] for _, kind, names in folders.values()}
    return {k: list(dict.fromkeys([*names[:2], *plain[k]])) for _, k, names in folders.values()}


def build(kind: str, name: str, only_layers: bool = False, keep_given: bool = False) -> nn.Module:
    """A tiny float model, of which no matrix is as its constructor leaves it."""
    torch.manual_seed(0)
    config = tiny(configuration_auto.CONFIG_MAPPING[kind], only_layers=only_layers, keep_given=keep_given)
    made = getattr(transformers, name)
    with torch.device("meta"):
        try:
            size = sum(p.numel() for p in made(copy.deepcopy(config)).parameters())
        except Exception:  # some compute with what they make
            size = 0
    if size > MOST:
        raise MemoryError(f"it has {size / 1e6:.0f} million parameters, however it is shrunk")
    model = made(config).eval()
    generator = torch.Generator().manual_seed(1)
    padding = {
        id(m.weight): m.padding_idx
        for m in model.modules()
        if isinstance(m, nn.Embedding) and m.padding_idx is not None
    }
    own = model._keys_to_ignore_on_save or ()  # what it computes
    with torch.no_grad():
        for fqn, w in model.named_parameters():
            if fqn in own:
                continue
            if not w.isfinite().all():
                w.zero_()
            if w.dim() > 1 and "A_log" not in fqn and w.is_floating_point():
                w.add_(torch.randn(w.shape, generator=generator), alpha=0.02)
            if id(w) in padding:
                w[padding[id(w)]] = 0  # some make it so when they are read
    return model


# ------------------------------------------------------------------------------- what is done


def _tensors(out):
    if isinstance(out, torch.Tensor):
        return [out] if out.is_floating_point() else []
    if isinstance(out, dict):
        out = list(out.values())
    return [t for o in out for t in _tensors(o)] if isinstance(out, list | tuple) else []


def forward(model: nn.Module, inputs: dict) -> list[torch.Tensor]:
    torch.manual_seed(0)  # some draw noise
    with torch.no_grad():
        return _tensors(model(**inputs))


def places(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def assert_equal(got: nn.Module, expected: nn.Module) -> None:
    a, b = places(got), places(expected)
    assert list(a) == list(b), sorted(set(a) ^ set(b))[:5]
    for fqn, w in b.items():
        assert (type(a[fqn]), a[fqn].dtype, a[fqn].shape) == (type(w), w.dtype, w.shape), fqn
        if isinstance(w, RTNQuantizedTensor):
            assert torch.equal(a[fqn].qdata, w.qdata), fqn
            assert torch.equal(a[fqn].scale, w.scale), fqn
        else:
            assert torch.equal(a[fqn].nan_to_num(), w.nan_to_num()), fqn


def assert_close(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        finite = b[b.isfinite()]
        most = finite.abs().max().item() if finite.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * max(most, 1e-6), equal_nan=True)


Inputs = dict[str, dict]  # what a model is given, or parts of it, by their names; "" is the model


def answers(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    return [t for part, given in inputs.items() for t in forward(model.get_submodule(part), given)]


def answer(quantized: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """What it gives for `inputs`, which is what its dequantized copy gives."""
    got = answers(quantized, inputs)
    dense = copy.deepcopy(quantized)
    dequantize_(dense)
    assert_close(got, answers(dense, inputs))
    return got


UNKNOWN = ("use not known", "not understood")


def left_float(model: nn.Module, report) -> list[str]:
    """The large weights whose use is not known, by the class of their module. Every large weight that is float
    has a reason."""
    found = set()
    for row in report.rows:
        if row.bits is None and len(row.shape) > 1 and torch.Size(row.shape).numel() >= LARGE:
            assert row.note, row
            if row.note.endswith(UNKNOWN):
                prefix, _, name = row.name.rpartition(".")
                found.add(f"{type(model.get_submodule(prefix)).__name__}.{name}")
    return sorted(found)


def check(model: nn.Module, inputs: Inputs, keep: list[str], folder: Path) -> list[str]:
    """Raises AssertionError, or what was raised, where something is not as it should be; gives `left_float`.
    What `keep` names stays float."""
    rules = [*((pattern, None) for pattern in keep), ("*", CONFIG)] if keep else CONFIG
    model.save_pretrained(folder / "float")
    quantized = copy.deepcopy(model)
    report = quantize_(quantized, rules)
    got = answer(quantized, inputs)
    quantized.save_pretrained(folder / "saved")
    again = load(folder / "saved")
    assert_equal(again, quantized)
    assert_close(answers(again, inputs), got)
    save(quantized, folder / "own")
    assert_equal(type(quantized).from_pretrained(folder / "own").eval(), quantized)
    # `load` leaves the output layer float, too.
    loaded = load(folder / "float", rules)
    chosen = [fqn for fqn, w in places(loaded).items() if isinstance(w, RTNQuantizedTensor)]
    if chosen:
        quantize_(model, [(fqn, CONFIG) for fqn in chosen], lambda module, fqn: True)
    assert_equal(loaded, model)
    return left_float(quantized, report)


# ------------------------------------------------------------------------------- the list

# What the product does not do yet with a model's weights, which are then left float, and why.
KNOWN = {
    "inkling2": (
        ["*.weight_proj"],
        "its names of `weight_proj` in files are not told apart from a quantized weight's; `save` says so, and "
        "the weight stays float by a rule",
    ),
    "maskformer": (
        ["*.attention.self.*", "*.attention.output.*", "*.intermediate.*", "*.output.*"],
        "the names of its Swin's weights in files are not told apart from a quantized weight's; `save` says so, "
        "and the weights stay float by rules",
    ),
}


def reason(error: BaseException) -> str:
    if isinstance(error, ImportError) and (named := re.search(r"requires the (\w+) library", str(error))):
        return f"needs {named[1]}"
    if isinstance(error, MemoryError):
        return "large, however its config is shrunk"
    return "the test makes no small config of it"


WAYS = ({}, {"wide": True}, {"given": True})  # how a config is shrunk


def find(kind: str, names: list[str]) -> dict:
    """The entry of the list for a model type: the class that can be made, and what goes in: into the model,
    or else into its parts."""
    best, why, in_parts = None, None, None
    for name in names:
        for way in WAYS:
            entry = {"type": kind, "class": name} | way
            try:
                model = make(entry)
            except Exception as error:
                why = why or reason(error)
                continue
            best = best or entry
            if (trial := first_trial(model)) is not None:
                return entry | {"trial": trial}
            if in_parts is None and (found := parts(model)):
                in_parts = entry | {"parts": found}
    if best is None:
        return {"type": kind, "class": names[0], "not built": why}
    if in_parts:
        return in_parts
    model = make(best)
    return best | {"layers": missing(model, {n: 0 for given in _trials(model) for n in given})}


def make(entry: dict) -> nn.Module:
    return build(entry["type"], entry["class"], entry.get("wide", False), entry.get("given", False))


def first_trial(model: nn.Module) -> int | None:
    """The first of the trials that a model answers."""
    for i, inputs in enumerate(_trials(model)):
        try:
            assert forward(model, inputs)
        except Exception:
            continue
        return i
    return None


def parts(model: nn.Module) -> dict[str, int]:
    """The trials of the largest models in a model that answer."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and isinstance(module, transformers.PreTrainedModel):
            if (trial := first_trial(module)) is not None:
                found[name] = trial
    return found


def _trials(model: nn.Module) -> list[dict]:
    try:
        return list(trials(model))
    except Exception:  # sizes of a config that are no numbers
        return []


def layers(model: nn.Module) -> Inputs:
    """Inputs of each linear layer by itself, of a model for which none are known."""
    return {
        name: {"input": numbers(2, module.in_features)}
        for name, module in model.named_modules()
        if type(module) is nn.Linear
    }


def missing(model: nn.Module, given: dict) -> list[str]:
    """What the model's forward asks for that is not among `given`."""
    return [n for n in required(model)[0] if n not in given]


def run(entry: dict) -> list[str]:
    model = make(entry)
    chosen = entry.get("parts", {"": entry["trial"]} if "trial" in entry else {})
    inputs = {part: _trials(model.get_submodule(part))[trial] for part, trial in chosen.items()}
    if "trial" not in entry:
        outer = tuple(f"{part}." for part in chosen)
        inputs |= {name: given for name, given in layers(model).items() if not name.startswith(outer)}
    keep = KNOWN.get(entry["type"], ([], ""))[0]
    with tempfile.TemporaryDirectory() as folder:
        return check(model, inputs, keep, Path(folder))


def entries(path: Path = LIST) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _counts(found: list[dict]) -> str:
    ways = [sum(way in e for e in found) for way in ("trial", "parts", "layers", "not built")]
    return f"| {len(found)} | {' | '.join(map(str, ways))} |"


def section(found: list[dict], diffusion: list[dict]) -> str:
    """What docs/models.md says of the two lists."""
    lines = [
        "A tiny random model of every architecture goes through `quantize_`, `save`, `load` of that and of the "
        "float folder,",
        "and the report (`tests/zoo/`, a slow test over a list of transformers 5.23 and diffusers 0.42); of "
        "transformers one",
        "class of each, and `from_pretrained`, too. It answers as its dequantized copy does: the model, where "
        "inputs that go",
        "together can be made by rule; else the models that are parts of it (a tower, a decoder), and each "
        "linear layer outside",
        "of these by itself.",
        "",
        "| | architectures | the model answers | its parts do | its layers alone do | not made small |",
        "|---|---|---|---|---|---|",
        f"| transformers {_counts(found)}",
        f"| diffusers {_counts(diffusion)}",
        "",
        "| exception | architectures |",
        "|---|---|",
    ]
    rows: dict[str, list[str]] = defaultdict(list)
    weights: dict[str, list[str]] = defaultdict(list)
    for e in [*found, *diffusion]:
        name = e.get("type", e["class"])
        if "not built" in e:
            rows[f"not built: {e['not built']}"].append(name)
        if "parts" in e:
            rows[IN_PARTS].append(f"{name} ({', '.join(e['parts'])})")
        if "layers" in e and e["layers"]:
            rows[OWN_INPUTS].append(f"{name} ({', '.join(e['layers'])})")
        elif "layers" in e:
            rows[NO_SHAPES].append(name)
        if name in KNOWN:
            rows[KNOWN[name][1]].append(name)
        for weight in e.get("float", []):
            if name not in weights[parameter := weight.rpartition(".")[2]]:
                weights[parameter].append(name)
    lines += [f"| {why} | {', '.join(kinds)} |" for why, kinds in rows.items()]
    lines += [
        "",
        "Large weights that stay float as nothing here knows how they are used, and whose note in the report "
        "says so; most are",
        "tables of positions:",
        "",
        "| parameter | architectures |",
        "|---|---|",
    ]
    lines += [f"| `{parameter}` | {', '.join(kinds)} |" for parameter, kinds in sorted(weights.items())]
    return "\n".join(lines) + "\n"


IN_PARTS = "compared by these parts, and by the layers outside of them"
OWN_INPUTS = "compared by layers, as its forward asks for what the test does not make"
NO_SHAPES = "compared by layers, as no shapes that the test makes go together in it"
HEADING = "## The model zoo\n\n"


def of_page() -> str:
    text = PAGE.read_text(encoding="utf-8")
    return text[text.index(HEADING) + len(HEADING) :].split("\n## ")[0]


def write_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    new = section(entries(), entries(DIFFUSION))
    text = text.replace(of_page(), new) if HEADING in text else f"{text.rstrip()}\n\n{HEADING}{new}"
    PAGE.write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    chosen = set(sys.argv[1:])
    found = {e["type"]: e for e in entries()} if LIST.exists() else {}
    table = classes()
    for kind, names in table.items():
        if chosen and kind not in chosen:
            continue
        entry = find(kind, names)
        if "not built" not in entry:
            try:
                entry |= {"float": left} if (left := run(entry)) else {}
            except Exception as error:
                print(f"{kind}: FAILS: {type(error).__name__}: {str(error)[:300]}", flush=True)
        print(json.dumps(entry), flush=True)
        found[kind] = entry
        LIST.write_text(
            "".join(json.dumps(found[k]) + "\n" for k in table if k in found), encoding="utf-8", newline="\n"
        )
    write_page()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    main()
