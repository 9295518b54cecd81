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
from zoo.inputs import trials
from zoo.tiny_configs import tiny

from rtn_tensor import RTNQuantizedTensor, dequantize_, load, quantize_, rtn_int4, save

LIST = Path(__file__).with_name("transformers.jsonl")
DIFFUSION = Path(__file__).with_name("diffusers.jsonl")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
CONFIG = rtn_int4(group_size=32)
LARGE = 1024  # the elements of a weight that may not stay float without a reason
MOST = 4e7  # the parameters of what is still tiny

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


def build(kind: str, name: str, only_layers: bool = False) -> nn.Module:
    """A tiny float model, of which no matrix is as its constructor leaves it."""
    torch.manual_seed(0)
    config = tiny(configuration_auto.CONFIG_MAPPING[kind], only_layers=only_layers)
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


def answer(quantized: nn.Module, inputs: dict | None) -> list[torch.Tensor]:
    """What it gives for `inputs`, which is what its dequantized copy gives; nothing where none are known."""
    if inputs is None:
        return []
    got = forward(quantized, inputs)
    dense = copy.deepcopy(quantized)
    dequantize_(dense)
    assert_close(got, forward(dense, inputs))
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


def check(model: nn.Module, inputs: dict | None, keep: list[str], folder: Path) -> list[str]:
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
    if inputs is not None:
        assert_close(forward(again, inputs), got)
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


def find(kind: str, names: list[str]) -> dict:
    """The entry of the list for a model type: the class that can be made, and what goes in."""
    best, why = None, None
    for name in names:
        for wide in (False, True):
            entry = {"type": kind, "class": name} | ({"wide": True} if wide else {})
            try:
                model = build(kind, name, wide)
            except Exception as error:
                why = why or reason(error)
                continue
            best = best or entry
            for i, inputs in enumerate(_trials(model)):
                try:
                    assert forward(model, inputs)
                except Exception:
                    continue
                return entry | {"trial": i}
    if best is None:
        return {"type": kind, "class": names[0], "not built": why}
    return best | {"not run": "takes none of the inputs that the test makes"}


def _trials(model: nn.Module) -> list[dict]:
    try:
        return list(trials(model))
    except Exception:  # sizes of a config that are no numbers
        return []


def run(entry: dict) -> list[str]:
    model = build(entry["type"], entry["class"], entry.get("wide", False))
    inputs = _trials(model)[entry["trial"]] if "trial" in entry else None
    keep = KNOWN.get(entry["type"], ([], ""))[0]
    with tempfile.TemporaryDirectory() as folder:
        return check(model, inputs, keep, Path(folder))


def entries(path: Path = LIST) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _counts(found: list[dict]) -> str:
    built = [e for e in found if "not built" not in e]
    ran = sum("trial" in e for e in built)
    return f"| {len(found)} | {ran} | {len(built) - ran} | {len(found) - len(built)} |"


def section(found: list[dict], diffusion: list[dict]) -> str:
    """What docs/models.md says of the two lists."""
    lines = [
        "A tiny random model of every architecture goes through `quantize_`, `save`, `load` of that and of the "
        "float folder,",
        "and the report (`tests/zoo/`, a slow test over a list of transformers 5.23 and diffusers 0.42); of "
        "transformers one",
        "class of each, and `from_pretrained`, too. Where its inputs can be made, it answers as its dequantized "
        "copy does.",
        "",
        "| | architectures | all steps | all but the answer | not made small |",
        "|---|---|---|---|---|",
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
        for what in ("not built", "not run"):
            if what in e:
                rows[f"{what}: {e[what]}"].append(name)
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
