"""What four small models keep under each way of quantizing: how far the outputs move from the float model's.

    python -m benchmarks.four_bits [--model NAME ...] [--only METHOD ...] [--peer METHOD=FOLDER ...]
    [--threads 2] [--json FILE]

Two of the models, Whisper base and MiniLM, were never quantized before; SmolLM2 and gemma had been, and say
less. Every linear layer but the output layer is quantized. The float model has 16 bits as it comes (MiniLM's
fp32 is cast to fp16), and so have the scales. What is measured runs in fp32 on exactly what the weights stand
for, so that no rounding of activations is in it.

- smollm2, gemma: the first 2048 tokens of the Wikipedia text in two windows. `kl`: nats per token from the
  float model's distribution of the next token; `top1`: share of tokens where both rank the same token first;
  `perplexity`.
- whisper: next tokens given those before, of the float model's own transcripts (`kl_own`) and, where it is
  known, of what was said (`kl_said`); `kl` is over both. `word_errors`: of the greedy transcript, in words of
  the float model's.
- minilm: `distance`, the mean of 1 - cosine between embeddings of 512 sentences of the Wikipedia text.

A method is one line of `METHODS`: a function that quantizes the model in place. It is given a function, too,
that returns what the model can be refined on, as keywords: none for a causal language model, which writes its
own text; `batches` for the others, of speech and text that are not measured. "On the peers' text" is on what
`benchmarks.accuracy_peers` gives to methods that need some, which is of the kind that is measured. A peer is
a transformers folder of the same model by another method, as `benchmarks.accuracy_peers` makes them; it is
measured as it is. Needs mwparserfromhell.
"""

import argparse
import json
import re
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.accuracy_peers import runs
from benchmarks.machine import add_kept_json, add_threads, machine
from benchmarks.real_data import sentences, speech, state_of_the_union, wikipedia
from benchmarks.real_model import gemma, minilm, smollm2, whisper
from rtn_tensor import dequantize_, quantize_, refine_, rtn_int4, rtn_int8
from rtn_tensor.config import RTNConfig
from rtn_tensor.evaluation.comparison import divergences
from rtn_tensor.formats import SCALE_METHODS
from rtn_tensor.integrations.transformers.models import but_the_output
from rtn_tensor.quantize.report import Report, report

Inputs = dict[str, Any]
Method = Callable[[nn.Module, Callable[[], Inputs]], object]


def plain(config: RTNConfig) -> Method:
    return lambda model, inputs: quantize_(model, config, but_the_output(model))


def refined(config: RTNConfig, seed: int = 0) -> Method:
    return lambda model, inputs: refine_(model, config, but_the_output(model), seed=seed, **inputs())


def on_the_peers_text(config: RTNConfig) -> Method:
    """Of SmolLM2 only, whose tokens they are."""
    return lambda model, inputs: refine_(model, config, but_the_output(model), tokens=runs())


AS_PEERS = {"int4 g64": rtn_int4(64), "int4 g32 search8": rtn_int4(32, "search8")}
METHODS: dict[str, Method] = {
    "float": lambda model, inputs: None,
    **{
        f"int4 g{size} {method}": plain(rtn_int4(size, method))
        for size in (128, 64, 32)
        for method in SCALE_METHODS
    },
    **{f"int8 g128 {method}": plain(rtn_int8(128, method)) for method in SCALE_METHODS},
    **{f"int4 g{size} refined": refined(rtn_int4(size)) for size in (128, 64, 32)},
    "int4 g32 search8 refined": refined(rtn_int4(32, "search8")),
    "int4 g64 refined, another seed": refined(rtn_int4(64), seed=1),
    **{f"{name} refined on the peers' text": on_the_peers_text(config) for name, config in AS_PEERS.items()},
}
WINDOW, TOKENS = 1024, 2048
SENTENCES, CALIBRATION_SENTENCES, BATCH = 512, 256, 32
CALIBRATION_RECORDINGS = ("endgame", "telephone")
MEASURED_RECORDINGS = ("two_cities", "beckett", "interview", "sonnet")
LONGEST_TRANSCRIPT = 128
ROWS = 256  # logits compared at once


class Case(NamedTuple):
    """A model, and how what was made of it is measured."""

    load: Callable[[], Any]
    inputs: Callable[[], Inputs]  # keywords for a method that needs more than the weights
    measure: Callable[[Any], dict[str, float]]


def exact(model: Any) -> Any:
    """The model in fp32, each weight what its planes stand for."""
    dequantize_(model.float())
    return model.eval()


@torch.no_grad()
def causal(load: Callable[[], Any], ids: Tensor, window: int = WINDOW, first: int | None = None) -> Case:
    """A causal language model on tokens `ids`, in windows that each begin with the token `first`, if any."""
    windows = ids.split(window)
    if first is not None:
        windows = [torch.cat([torch.tensor([first]), part]) for part in windows]

    def logits(model: Any) -> list[Tensor]:
        return [model(tokens[None], use_cache=False).logits[0, :-1] for tokens in windows]

    reference = logits(exact(load()))

    def measure(model: Any) -> dict[str, float]:
        kl, same, losses = [], [], []
        for ours, theirs, tokens in zip(logits(model), reference, windows, strict=True):
            kl.append(divergences(theirs, ours))
            same.append(ours.argmax(-1) == theirs.argmax(-1))
            losses.append(
                torch.cat(
                    [
                        F.cross_entropy(o, t, reduction="none")
                        for o, t in zip(ours.split(ROWS), tokens[1:].split(ROWS), strict=True)
                    ]
                )
            )
        return {
            "kl": torch.cat(kl).mean().item(),
            "top1": torch.cat(same).double().mean().item(),
            "perplexity": torch.cat(losses).double().mean().exp().item(),
        }

    return Case(load, dict, measure)


@torch.no_grad()
def encoder(load: Callable[[], Any], batches: Sequence[Inputs], calibration: Sequence[Inputs]) -> Case:
    """A model whose mean over the tokens of its last hidden states, normalized, is a text's embedding."""

    def embeddings(model: Any) -> Tensor:
        means = []
        for batch in batches:
            mask = batch["attention_mask"][..., None]
            hidden = model(**batch).last_hidden_state.double()
            means.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(means)

    reference = embeddings(exact(load()))

    def measure(model: Any) -> dict[str, float]:
        return {"distance": (1 - (embeddings(model) * reference).sum(-1)).mean().item()}

    return Case(load, lambda: {"batches": list(calibration)}, measure)


@torch.no_grad()
def transcriber(
    load: Callable[[], Any],
    features: Tensor,
    said: Sequence[list[int] | None],
    calibration: Iterable[Tensor],
    prompt: list[int],
    words: Callable[[list[int]], list[str]],
    longest: int = LONGEST_TRANSCRIPT,
) -> Case:
    """A Whisper on clips.

    Args:
        features: of the clips, [clips, bins, frames].
        said: the tokens of what is said in each, where that is known.
        calibration: features of other clips, each [1, bins, frames].
        prompt: the tokens before those of a transcript.
        words: the words of a transcript, given its tokens.
        longest: tokens of a transcript.
    """

    def encode(model: Any, features: Tensor) -> Tensor:
        return model.get_encoder()(features.to(model.dtype)).last_hidden_state

    def transcripts(model: Any, encoded: Tensor) -> list[list[int]]:
        """The token ranked first after those before it, of those that Whisper lets itself write."""
        never, not_first = (
            list(getattr(model.generation_config, name) or ())
            for name in ("suppress_tokens", "begin_suppress_tokens")
        )
        known = {"encoder_outputs": BaseModelOutput(last_hidden_state=encoded), "use_cache": True}
        ids = torch.tensor([prompt]).expand(len(encoded), -1)
        done = torch.zeros(len(encoded), dtype=torch.bool)
        out = model(decoder_input_ids=ids, **known)
        while True:
            logits = out.logits[:, -1]
            logits[:, never + (not_first if ids.shape[1] == len(prompt) else [])] = -torch.inf
            token = logits.argmax(-1).masked_fill(done, end)
            ids, done = torch.cat([ids, token[:, None]], -1), done | (token == end)
            if done.all() or ids.shape[1] == len(prompt) + longest:
                break
            out = model(decoder_input_ids=token[:, None], past_key_values=out.past_key_values, **known)
        rows = ids[:, len(prompt) :].tolist()
        return [row[: row.index(end)] if end in row else row for row in rows]

    model = load()
    dtype, end = model.dtype, model.config.eos_token_id
    reference = exact(model)
    encoded = encode(reference, features)
    own = transcripts(reference, encoded)
    texts = [(clip, text) for clip, text in enumerate(own)]
    texts += [(clip, text) for clip, text in enumerate(said) if text is not None]
    count = sum(len(text) + 1 for text in own)  # the end of a transcript is a token, too

    def next_tokens(model: Any, encoded: Tensor) -> Tensor:
        logits = []
        for clip, text in texts:
            ids = torch.tensor([prompt + text])
            hidden = BaseModelOutput(last_hidden_state=encoded[clip][None])
            out = model(encoder_outputs=hidden, decoder_input_ids=ids, use_cache=False).logits
            logits.append(out[0, len(prompt) - 1 :])
        return torch.cat(logits)

    expected = next_tokens(reference, encoded)

    @cache
    @torch.no_grad()
    def inputs() -> Inputs:
        batches = []
        for clip in calibration:
            (text,) = transcripts(reference, encode(reference, clip))
            ids = torch.tensor([[*prompt, *text, end]])
            batches.append({"input_features": clip.to(dtype), "decoder_input_ids": ids})
        return {"batches": batches}

    def measure(model: Any) -> dict[str, float]:
        encoded = encode(model, features)
        kl = divergences(expected, next_tokens(model, encoded))
        written = transcripts(model, encoded)
        errors = sum(edits(words(ours), words(theirs)) for ours, theirs in zip(written, own, strict=True))
        found = {"kl": kl.mean().item(), "kl_own": kl[:count].mean().item()}
        if count < len(kl):
            found["kl_said"] = kl[count:].mean().item()
        return found | {"word_errors": errors / sum(len(words(text)) for text in own)}

    return Case(load, inputs, measure)


def edits(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Words to insert, delete and replace (Levenshtein's distance)."""
    row = list(range(len(theirs) + 1))
    for i, word in enumerate(ours):
        above, row[0] = row[0], i + 1
        for j, other in enumerate(theirs):
            above, row[j + 1] = row[j + 1], min(above + (word != other), row[j] + 1, row[j + 1] + 1)
    return row[-1]


def quantized_by(config: RTNConfig | None, load: Callable[[], Any]) -> Callable[[], Any]:
    """`load`, or where there is a config, a function that quantizes what it gives."""
    if config is None:
        return load

    def load_and_quantize() -> Any:
        model = load()
        plain(config)(model, dict)
        return model

    return load_and_quantize


def a_language_model(folder: Callable[[], Path], config: RTNConfig | None = None) -> Case:
    tokenizer = AutoTokenizer.from_pretrained(folder())
    text = wikipedia()[: 20 * TOKENS]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:TOKENS]
    begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    load = partial(AutoModelForCausalLM.from_pretrained, folder(), dtype=torch.bfloat16)
    first = tokenizer.bos_token_id if begins else None
    return causal(quantized_by(config, load), torch.tensor(ids), first=first)


def a_whisper(config: RTNConfig | None = None) -> Case:
    processor = AutoProcessor.from_pretrained(whisper())
    tokenizer = processor.tokenizer

    def features(clips: Iterable) -> Tensor:
        samples = [clip.samples.numpy() for clip in clips]
        return processor.feature_extractor(samples, sampling_rate=16000, return_tensors="pt").input_features

    def words(ids: list[int]) -> list[str]:
        return re.findall(r"[\w']+", tokenizer.decode(ids, skip_special_tokens=True).lower())

    clips = speech(*MEASURED_RECORDINGS)
    said = [
        None if c.text is None else tokenizer(" " + c.text, add_special_tokens=False)["input_ids"]
        for c in clips
    ]
    others = [*speech(*CALIBRATION_RECORDINGS), *speech(*CALIBRATION_RECORDINGS, whole=True)]
    prompt = tokenizer.convert_tokens_to_ids(
        ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    )
    load = partial(WhisperForConditionalGeneration.from_pretrained, whisper(), dtype=torch.float16)
    calibration = (features([clip]) for clip in others)
    return transcriber(quantized_by(config, load), features(clips), said, calibration, prompt, words)


def a_minilm(config: RTNConfig | None = None) -> Case:
    tokenizer = AutoTokenizer.from_pretrained(minilm())

    def batches(texts: list[str]) -> list[Inputs]:
        texts = sorted(texts, key=len)
        return [
            dict(tokenizer(texts[i : i + BATCH], padding=True, return_tensors="pt"))
            for i in range(0, len(texts), BATCH)
        ]

    load = partial(AutoModel.from_pretrained, minilm(), dtype=torch.float16)
    return encoder(
        quantized_by(config, load),
        batches(sentences(wikipedia(), SENTENCES)),
        batches(sentences(state_of_the_union(), CALIBRATION_SENTENCES)),
    )


CASES: dict[str, Callable[..., Case]] = {
    "whisper": a_whisper,
    "minilm": a_minilm,
    "smollm2": partial(a_language_model, smollm2),
    "gemma": partial(a_language_model, gemma),
}


def bits_per_weight(made: Report) -> float | None:
    """Of the weights that are quantized; None where none is."""
    rows = [row for row in made.rows if row.bits is not None]
    weights = sum(torch.Size(row.shape).numel() for row in rows)
    return 8 * sum(row.bytes_after for row in rows) / weights if rows else None


def peer(folder: str) -> Method:
    """Takes the weights of a folder of the same model."""
    return lambda model, inputs: model.load_state_dict(
        type(model).from_pretrained(folder, dtype=model.dtype).state_dict()
    )


def row(case: Case, method: Method) -> dict[str, Any]:
    model = case.load().eval()
    started = time.perf_counter()
    method(model, case.inputs)
    seconds = time.perf_counter() - started
    bits = bits_per_weight(report(model))
    with torch.inference_mode():
        metrics = case.measure(exact(model))
    return {"bits_per_weight": bits, **metrics, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.four_bits", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--model", choices=CASES, action="append", help="only this; may repeat (default: all four)"
    )
    parser.add_argument(
        "--only", choices=METHODS, metavar="METHOD", action="append", help="only this; may repeat"
    )
    parser.add_argument(
        "--peer",
        metavar="METHOD=FOLDER",
        action="append",
        default=[],
        help="only these methods and folders, of the one --model; may repeat",
    )
    add_threads(parser)
    add_kept_json(parser)
    args = parser.parse_args()
    if args.peer and len(args.model or CASES) != 1:
        parser.error("--peer is a folder of one model; name it with --model")
    peers = {name: peer(folder) for name, folder in (given.split("=", 1) for given in args.peer)}
    ours = args.only or ([] if peers else METHODS)
    methods = {name: METHODS[name] for name in ours} | peers
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    for name in args.model or CASES:
        print(f"\n{name}", flush=True)
        case = CASES[name]()
        for label, method in methods.items():
            if label.endswith("peers' text") and name != "smollm2":
                continue
            made = {"model": name, "method": label, **row(case, method)}
            numbers = [f"{key} {value:.4g}" for key, value in made.items() if isinstance(value, float)]
            print(f"  {label:20} {', '.join(numbers)}", flush=True)
            if args.json:
                keep(args.json, made, "method")


def keep(file: Path, made: dict[str, Any], kind: str) -> None:
    """Puts a row among those of the file, in place of the one of its model and `kind`."""
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    found = {(row["model"], row[kind]): row for row in rows} | {(made["model"], made[kind]): made}
    about = {"machine": machine(), "tokens": TOKENS, "window": WINDOW, "sentences": SENTENCES}
    about["recordings"] = list(MEASURED_RECORDINGS)
    file.write_text(json.dumps(about | {"rows": list(found.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
