"""What `export` is to write of a model, all of it checked before the first byte is written."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rtn_tensor.checkpoint.card import in_words
from rtn_tensor.checkpoint.fill import some
from rtn_tensor.checkpoint.foreign import compressed_tensors, gguf, gptq
from rtn_tensor.checkpoint.foreign.written import Engine, Lazy, Weight, group_sizes, planes_of
from rtn_tensor.integrations.transformers.files import tensors_in_files
from rtn_tensor.integrations.transformers.models import ends
from rtn_tensor.quantize.report import Report, report
from rtn_tensor.tensor import RTNQuantizedTensor
from rtn_tensor.tensor.copies import with_wide_scales

SYMMETRIC = frozenset({"qdata", "scale"})
LEAST_ROWS = 32  # of a weight for which engines have kernels


@dataclass(frozen=True)
class FolderFormat:
    """A format that is a folder of safetensors, of which each quantized linear is some.

    Attributes:
        tensors: those of one weight, by name.
        config: the quantization_config of config.json, of the weights, the names of the float linears, and
            that of the output layer, all as the files have them, and the model's own names where it has
            others.
        engines: which programs read what is written of such weights and float linears.
        refuses: why a weight cannot be written, and the way out; None where it can.
        planes: of a weight that it has.
        copies_of_config: other files that hold the same as config.json's quantization_config.
    """

    tensors: Callable[[Weight], dict[str, Lazy]]
    config: Callable[[Sequence[Weight], Collection[str], str | None, Mapping[str, str]], dict[str, Any]]
    engines: Callable[[Sequence[Weight], Collection[str]], list[Engine]]
    refuses: Callable[[Weight], str | None]
    planes: frozenset[str] = SYMMETRIC
    copies_of_config: tuple[str, ...] = ()


FORMATS = {
    "compressed-tensors": FolderFormat(
        compressed_tensors.tensors,
        compressed_tensors.config,
        compressed_tensors.engines,
        compressed_tensors.refuses,
        SYMMETRIC | {"zero"},
    ),
    "gptq": FolderFormat(
        gptq.tensors,
        gptq.config,
        gptq.engines,
        gptq.refuses,
        copies_of_config=("quantize_config.json",),
    ),
}


@dataclass(frozen=True)
class ExportReport(Report):
    """What was written in another format, weight by weight.

    Attributes:
        format: its name.
        changes: what is otherwise than in the model, though with the same integers and scales.
        engines: which programs read it, or do not, and why.
    """

    format: str
    changes: list[str]
    engines: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As `Report.to_dict`, and the format, changes and engines."""
        return super().to_dict() | {
            "format": self.format,
            "changes": self.changes,
            "engines": self.engines,
        }

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *self.changes, *self.engines])


@dataclass(frozen=True)
class Plan:
    """What is to be written, all of it checked."""

    tensors: dict[str, Lazy]
    config: dict[str, Any]
    engines: list[Engine]
    report: ExportReport
    formats: list[str]


def plan(model: Any, format_name: str) -> Plan:
    """What is to be written of `model`.

    Raises:
        ValueError: as `export`.
    """
    how = FORMATS[format_name]
    found, of = _tensors(model, format_name)
    tensors: dict[str, Lazy] = {}
    chosen: dict[str, RTNQuantizedTensor] = {}
    floats: list[str] = []
    why_float: dict[str, str] = {}
    embeddings = {name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    attention = {name for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    for name, t in found.items():
        module, _, last = name.rpartition(".")
        owner = of.get(name, "").rpartition(".")[0]
        in_embedding = owner in embeddings
        in_attention = not attention.isdisjoint((owner, owner.rpartition(".")[0]))
        if not isinstance(t, RTNQuantizedTensor):
            tensors[name] = Lazy.of(t)
            if last == "weight" and t.dim() == 2 and not in_embedding:
                floats.append(module)
            elif t.dim() == 3 and module.endswith(".experts") and module not in floats:
                floats.append(module)
        elif why := _why_float(t, in_embedding, in_attention):
            tensors[name] = _dequantized(t)
            why_float[of[name]] = why
            if not in_embedding:
                floats.append(module)
        elif last != "weight" or t.dim() != 2:
            raise ValueError(
                f"{of[name]} is written as {name} {list(t.shape)}, and {format_name} has quantized "
                "matrices named "
                f"weight only; leave this one float"
            )
        else:
            chosen[module] = t
    if not chosen:
        raise _not_quantized(model)
    sizes = group_sizes(chosen)
    weights = [Weight(module, w, sizes[module]) for module, w in chosen.items()]
    nbytes: Counter[str] = Counter()
    by_name: dict[str, Weight] = {}
    for weight in weights:
        if why := how.refuses(weight):
            raise ValueError(f"{weight.module}: {why}")
        tensors |= (made := how.tensors(weight))
        fqn = of[f"{weight.module}.weight"]
        nbytes[fqn] += sum(lazy.nbytes for lazy in made.values())
        by_name[fqn] = weight
    nbytes.update({of[name]: tensors[name].nbytes for name in of if of[name] in why_float})
    owners = ((name.rpartition("."), fqn.rpartition(".")) for name, fqn in of.items())
    own = {there[0]: here[0] for there, here in owners if there[2] == here[2] == "weight"}
    output = next((name for name, m in model.named_modules() if m is ends(model)[1]), None)
    output = next((there for there, here in own.items() if here == output), output)
    if output is not None and output not in chosen and output not in floats:  # tied
        floats.append(output)
    engines = how.engines(weights, floats)
    formats = Counter(in_words(w, sizes[module]) for module, w in chosen.items())
    return Plan(
        tensors,
        how.config(weights, floats, output, {there: here for there, here in own.items() if there != here}),
        engines,
        _report(model, format_name, by_name, why_float, nbytes, engines),
        [f"{text} ({count} matrices)" for text, count in formats.items()],
    )


def _not_quantized(model: Any) -> ValueError:
    return ValueError(
        f"no weight of {type(model).__name__} is there to be written quantized; quantize it first "
        "(quantize_(model, rtn_int4()), or load(folder, rtn_int4()))"
    )


def _tensors(model: Any, format_name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`tensors_in_files`, of a model whose quantized weights the writers know."""
    for name, w in model.named_parameters():
        if isinstance(w, RTNQuantizedTensor):
            _check_planes(name, w, format_name)
    found, of = tensors_in_files(model)
    return {name: with_wide_scales(t) for name, t in found.items()}, of


def plan_gguf(model: Any, file: Path) -> tuple[gguf.Like, dict[str, gguf.Written], int, ExportReport]:
    """What is to be written of `model` onto the GGUF `file`: that, the tensors, the bits of most weights, and
    the report.

    Raises:
        ValueError: as `export`.
    """
    found, of = _tensors(model, "gguf")
    quantized = {name: t for name, t in found.items() if isinstance(t, RTNQuantizedTensor)}
    if not quantized:
        raise _not_quantized(model)
    like = gguf.Like(file)
    about = model.config.get_text_config()
    counts = (getattr(about, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    heads = {name: count for name, count in zip(("q_proj", "k_proj"), counts, strict=True) if count}
    tensors, rounded = gguf.planned(found, like, heads)
    sizes: Counter[int] = Counter()
    nbytes: Counter[str] = Counter()
    for name, w in quantized.items():
        sizes[w.bits] += w.numel()
        nbytes[of[name]] += w.numel() // gguf.BLOCK * gguf.BLOCK_BYTES[w.bits]
    rows = [
        replace(row, group_size=gguf.BLOCK, bytes_after=nbytes[row.name]) if row.name in nbytes else row
        for row in report(model).rows
    ]
    changes = [f"All groups are written as blocks of {gguf.BLOCK}, each with its group's scale."]
    if rounded:
        changes.append(f"The scales of {rounded} weights are rounded to float16, which blocks have.")
    changes.append(f"The tokenizer, the metadata and what stays float are those of {file.name}.")
    changes += _left_out(model)
    note = "it rounds the activations to 8 bits" + (
        "" if like.architecture == "llama" else f"; not tried with models of the kind {like.architecture!r}"
    )
    engines = [
        Engine("llama.cpp (of xllamacpp 2026.10)", True, note),
        Engine("Ollama", True, "by llama.cpp"),
        Engine("LM Studio", True, "by llama.cpp"),
    ]
    return (
        like,
        tensors,
        sizes.most_common(1)[0][0],
        ExportReport(rows, "gguf", changes, [f"{e}." for e in engines]),
    )


def _check_planes(name: str, w: RTNQuantizedTensor, format_name: str) -> None:
    if w.transposed:
        raise ValueError(
            f"{name} is stored as [in_features, out_features], and {format_name} has rows of in_features "
            "only; leave "
            "it float, or use save for this library alone"
        )
    known = FORMATS[format_name].planes if format_name in FORMATS else SYMMETRIC
    if unknown := sorted({*planes_of(w)} - known):
        raise ValueError(
            f"{name} has a plane {unknown[0]!r}, as scale_method={w.scale_method!r} gives it, and "
            f"{format_name} is not written with it; use compressed-tensors, or a symmetric scale_method, as "
            "'signed'"
        )


def _why_float(w: RTNQuantizedTensor, in_embedding: bool, in_attention: bool) -> str | None:
    """Why engines have `w` as a float weight."""
    if in_embedding:
        return "engines keep embeddings float"
    if in_attention:
        return "engines keep nn.MultiheadAttention float"
    return _too_few_rows(w)


def _too_few_rows(w: RTNQuantizedTensor) -> str | None:
    n = w.shape[-2] if w.dim() > 1 else 0
    each = 32 // w.bits
    if n >= LEAST_ROWS and n % each == 0:
        return None
    return f"engines have no kernel for {n} rows (but for multiples of {each} from {LEAST_ROWS} on)"


def _dequantized(w: RTNQuantizedTensor) -> Lazy:
    return Lazy(w.dtype, tuple(w.shape), w.dequantize)


def _left_out(model: nn.Module) -> list[str]:
    """What is known of the weights that no format of others has a place for."""
    if all(getattr(w, "activations", None) is None for w in model.parameters()):
        return []
    return ["int8 activations are not written: an engine takes activations in its own way."]


def _report(
    model: nn.Module,
    format_name: str,
    weights: dict[str, Weight],
    why_float: dict[str, str],
    nbytes: Counter[str],
    engines: Sequence[Engine],
) -> ExportReport:
    rows = []
    cut: dict[tuple[int, int], int] = defaultdict(int)
    for row in report(model).rows:
        note = row.note
        if (weight := weights.get(row.name)) is not None:
            if weight.w.group_size not in (weight.group_size, -1) and weight.group_size != -1:
                note = "; ".join(filter(None, [note, f"groups of {weight.w.group_size}"]))
                cut[weight.w.group_size, weight.group_size] += 1
            row = replace(row, group_size=weight.group_size, bytes_after=nbytes[row.name], note=note)
        elif row.name in why_float:
            note = "; ".join(filter(None, [note, "written float"]))
            row = replace(row, bits=None, group_size=None, bytes_after=nbytes[row.name], note=note)
        rows.append(row)
    changes = [
        f"Groups of {was} are written as groups of {now}, the scale of each several times ({count} weights)."
        for (was, now), count in cut.items()
    ]
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, why in why_float.items():
        by_reason[why].append(name)
    changes += [f"Written float, as {why}: {some(names)}." for why, names in by_reason.items()]
    changes += _left_out(model)
    return ExportReport(rows, format_name, changes, [f"{engine}." for engine in engines])
