"""The arguments of `rtn-tensor` and of its subcommands."""

import argparse
from typing import Any, NoReturn

import torch

from rtn_tensor import __version__
from rtn_tensor.checkpoint.export import GGUF
from rtn_tensor.checkpoint.export_plan import FORMATS as OTHER_FORMATS
from rtn_tensor.cli.kernels import run_explain, run_tune
from rtn_tensor.cli.measure import run_compare, run_evaluate, run_inspect, run_perplexity
from rtn_tensor.cli.models import DTYPE_NAMES
from rtn_tensor.cli.quantize import OURS, SCHEMES, run_export, run_plan, run_quantize
from rtn_tensor.cli.talk import run_chat, run_generate, run_serve
from rtn_tensor.formats import ACTIVATIONS, FORMATS, SCALE_METHODS
from rtn_tensor.kernels.problem import device_of
from rtn_tensor.tuning import TOKENS

OTHERWISE = "what a quantized model rounds its activations to (default: as it was saved)"

# -------------------------------------------------------------------------------- arguments


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8; rename it, or type it in UTF-8") from None
    return text


def _path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the name is empty; give that of a file or folder")
    return _text(text)


def _tasks(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no task; give one or more, as in lambada,piqa")
    return names


def _positive(text: str) -> int:
    if not (text.isdecimal() and len(text) < 20) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def _port(text: str) -> int:
    if not (text.isdecimal() and len(text) < 6) or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give a number from 1 to 65535")
    return int(text)


def _device_argument(text: str) -> torch.device:
    try:
        return device_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _size(text: str) -> tuple[int, int]:
    try:
        n, k = map(int, text.split("x"))
    except ValueError:
        n = k = 0
    if min(n, k) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no weight's size; write out_features x in_features, as in 4096x14336"
        )
    return n, k


def _above_0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # The defaults of flags and lists say nothing.
        return super()._get_help_string(action) if action.default else action.help


OR_NAME = "or its name on the hub, as owner/name or owner/name@revision"
MODEL, FLOAT_MODEL = f"folder of the model, quantized or not, {OR_NAME}", f"folder of the model, {OR_NAME}"
EXAMPLES = """\
examples:
  rtn-tensor quantize Qwen/Qwen3-0.6B qwen3-int4           4 bits, in seconds
  rtn-tensor quantize Qwen/Qwen3-0.6B qwen3-int4 --refine  the same size, more accurate, in minutes
  rtn-tensor chat qwen3-int4
  rtn-tensor compare qwen3-int4 Qwen/Qwen3-0.6B --text a-text-of-yours.txt
  rtn-tensor serve qwen3-int4                              an OpenAI-compatible endpoint

exit status: 0; 1 after an error, which is one line on stderr; 2 for arguments that cannot be;
130 after Ctrl-C, 143 after SIGTERM"""
OF_COMMAND = {
    "quantize": """\
examples:
  rtn-tensor quantize Qwen/Qwen3-0.6B out --scheme W8A16
  rtn-tensor quantize Qwen/Qwen3-0.6B out --dry-run
  rtn-tensor quantize Qwen/Qwen3-0.6B out --rule '*.down_proj=8' --skip 'model.layers.0.*'
  rtn-tensor quantize Qwen/Qwen3-0.6B out --bits-per-weight 4.5 --refine
  rtn-tensor quantize Qwen/Qwen3-0.6B out --format compressed-tensors --push-to-hub me/qwen3-int4""",
    "plan": """\
example:
  rtn-tensor plan Qwen/Qwen3-0.6B --bits-per-weight 4.5 -o rules.json --draw map.png
  rtn-tensor quantize Qwen/Qwen3-0.6B out --rules rules.json""",
    "export": """\
examples:
  rtn-tensor export qwen3-int4 qwen3-ct
  rtn-tensor export qwen3-int4 qwen3.gguf --format gguf --like a-gguf-of-the-same-model.gguf""",
    "inspect": """\
examples:
  rtn-tensor inspect qwen3-int4
  rtn-tensor inspect Qwen/Qwen3-0.6B --verbose""",
    "perplexity": """\
example:
  rtn-tensor perplexity qwen3-int4 --text a-text-of-yours.txt --max-tokens 4096""",
    "compare": """\
example:
  rtn-tensor compare qwen3-int4 Qwen/Qwen3-0.6B --text a-text-of-yours.txt --draw compared.png""",
    "evaluate": """\
examples:
  rtn-tensor evaluate qwen3-int4 --tasks piqa,arc_easy --limit 200
  rtn-tensor evaluate qwen3-int4 --against Qwen/Qwen3-0.6B""",
    "generate": """\
examples:
  rtn-tensor generate qwen3-int4 "Why is the sky blue?" --max-new-tokens 200
  rtn-tensor generate qwen3-int4 "Once upon a time" --raw --temperature 0.8 --top-p 0.95""",
    "chat": """\
/clear begins anew, and /bye or the end of the input leaves; Ctrl-C ends a reply, and at the prompt leaves.

examples:
  rtn-tensor chat qwen3-int4
  rtn-tensor chat qwen3-int4 --system "You answer in one sentence." --temperature 0.7""",
    "serve": """\
The model has the name that it is given here. Ctrl-C ends the server.

example:
  rtn-tensor serve qwen3-int4 --port 8000
  curl http://localhost:8000/v1/chat/completions -H "Content-Type: application/json" \\
    -d '{"model": "qwen3-int4", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}'""",
    "explain": """\
example:
  rtn-tensor explain --bits 4 --m 16 --n 4096 --k 4096""",
    "tune": """\
example:
  rtn-tensor tune --model Qwen/Qwen3-0.6B""",
}


class _Parser(argparse.ArgumentParser):
    """Tells of a mistake where the examples are, too."""

    def error(self, message: str) -> NoReturn:
        super().error(f"{message}; `{self.prog} --help` has examples")


class _Completion(argparse.Action):
    """Prints a shell's completions of the parser's words, which shtab makes, and exits."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        import shtab

        if values not in shtab.SUPPORTED_SHELLS:
            parser.error(
                f"{values!r} is no shell that is known; use one of {', '.join(shtab.SUPPORTED_SHELLS)}"
            )
        print(shtab.complete(parser, shell=values))
        parser.exit()


def parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="rtn-tensor",
        description="Round-to-nearest int4 and int8 weights: no data, no calibration, seconds.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"rtn-tensor {__version__}")
    top.add_argument(
        "--print-completion",
        metavar="SHELL",
        action=_Completion,
        help="print what completes these words in bash, zsh, tcsh or fish",
    )
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        more = OF_COMMAND.get(name)
        sub = commands.add_parser(name, help=summary, description=summary, epilog=more, formatter_class=_Help)
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(run=run)
        return sub

    def add_format(sub: argparse.ArgumentParser, default: int | None = 4, more: str = "") -> None:
        sub.add_argument("--bits", type=int, choices=FORMATS, default=default, help=f"bits per weight{more}")
        sub.add_argument(
            "--group-size",
            type=int,
            help="weights that share a scale: a multiple of 32, or -1 for a whole row (default: 64 at 4 "
            "bits, 128 at 8)",
        )

    def add_activations(sub: argparse.ArgumentParser, what: str) -> None:
        sub.add_argument("--activations", choices=[name for name in ACTIVATIONS if name], help=what)

    def add_destination(sub: argparse.ArgumentParser, formats: list[str]) -> None:
        sub.add_argument(
            "--format",
            choices=formats,
            default=formats[0],
            help="rtn is this library's own; "
            * (formats[0] == OURS)
            + "vLLM, SGLang and transformers read compressed-tensors; vLLM, SGLang and GPTQModel gptq; "
            "llama.cpp, Ollama and LM Studio gguf",
        )
        sub.add_argument(
            "--like",
            metavar="FILE",
            type=_path,
            help="for gguf, a GGUF file of the same model, which gives the tokenizer and the metadata",
        )
        sub.add_argument("--force", action="store_true", help="replace dst, once the new one is whole")

    def add_plan(sub: argparse.ArgumentParser, required: bool, what: str) -> None:
        sub.add_argument(
            "--bits-per-weight",
            metavar="B",
            type=_above_0,
            required=required,
            help=what,
        )

    def add_selection(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--skip",
            metavar="PATTERN",
            action="append",
            default=[],
            help="layers to keep float, as in 'model.layers.0.*'; may repeat",
        )
        sub.add_argument("--embedding", action="store_true", help="quantize the embedding and lm_head too")
        sub.add_argument(
            "--language-model-only",
            action="store_true",
            help="keep float what is no part of the language model, as a vision tower and its projector",
        )

    def add_sampling(sub: argparse.ArgumentParser, most: int) -> None:
        sub.add_argument("--max-new-tokens", metavar="T", type=int, default=most, help="stop after this many")
        sub.add_argument(
            "--temperature",
            type=_above_0,
            help="draw tokens, those of low probability more often the higher it is (default: the likeliest)",
        )
        sub.add_argument("--top-p", type=_above_0, help="draw among the likeliest of so much probability")
        sub.add_argument("--seed", type=int, help="draw the same each time")

    def add_verbose(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--verbose", action="store_true", help="a line for each weight, and not for each kind of layer"
        )

    def add_text(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--text", metavar="FILE", type=_path, required=True, help="UTF-8 text")
        sub.add_argument("--window", type=int, default=1024, help="tokens the model sees at once")
        sub.add_argument(
            "--max-tokens", metavar="T", type=_positive, help="use only the first tokens of the text"
        )

    sub = command("quantize", run_quantize, "Quantize a transformers model into a folder.")
    sub.add_argument("src", type=_path, help=FLOAT_MODEL)
    sub.add_argument(
        "dst", type=_path, help="folder to write, or .gguf file; must not exist, unless --force is given"
    )
    add_format(sub, None, " (default: 4; those of GPTQ and the like are kept as they are)")
    sub.add_argument(
        "--scheme",
        choices=SCHEMES,
        help="bits of weights and activations by a name of vLLM's and llm-compressor's, in place of --bits",
    )
    sub.add_argument(
        "--scale-method",
        choices=SCALE_METHODS,
        help="how a group's scale is found (default: search at 4 bits, absmax at 8)",
    )
    add_activations(sub, "what products round their activations to (default: they stay as they are)")
    add_selection(sub)
    sub.add_argument(
        "--rule",
        metavar="PATTERN=FORMAT",
        action="append",
        default=[],
        help="a format of their own for some layers, as in '*.down_proj=8', '*.0.*=4,32,signed' or "
        "'lm_head=float'; may repeat, and the "
        "first that matches counts",
    )
    sub.add_argument(
        "--rules", metavar="FILE", type=_path, help='JSON of such rules, as in [["*.down_proj", {"bits": 8}]]'
    )
    add_plan(
        sub,
        False,
        "spread so many bits per weight, scales included, by what each layer costs, as `plan` does; minutes",
    )
    sub.add_argument(
        "--refine",
        action="store_true",
        help="round so that errors make up for one another, on text that the model writes itself; minutes",
    )
    sub.add_argument(
        "--refine-on",
        metavar="FILE",
        type=_path,
        help="with --refine, a UTF-8 text to use in place of its own",
    )
    sub.add_argument(
        "--recipe",
        metavar="FILE",
        type=_path,
        help="YAML or JSON of these options, as in 'bits: 4', which others add to; dst gets one",
    )
    sub.add_argument("--dry-run", action="store_true", help="only say what would come of it, and its size")
    add_verbose(sub)
    sub.add_argument(
        "--push-to-hub",
        metavar="NAME",
        type=_path,
        help="also upload dst, as owner/name, with a model card",
    )
    add_destination(sub, [OURS, *OTHER_FORMATS, GGUF])

    sub = command(
        "plan",
        run_plan,
        "Choose a format for each layer under a budget of bits, on text that the model writes itself.",
    )
    sub.add_argument("src", type=_path, help=FLOAT_MODEL)
    add_plan(sub, True, "bits per weight on average, scales included")
    add_selection(sub)
    sub.add_argument(
        "-o", "--output", metavar="FILE", type=_path, help="write the rules there, for quantize --rules"
    )
    sub.add_argument("--draw", metavar="FILE", type=_path, help="draw the map, as PNG or SVG")
    sub.add_argument("--force", action="store_true", help="replace these files")
    sub.set_defaults(format=OURS)

    sub = command(
        "export",
        run_export,
        "Write a quantized model for other engines, with the same integers and scales.",
    )
    sub.add_argument("src", type=_path, help="folder of a quantized model, or its name on the hub")
    sub.add_argument(
        "dst", type=_path, help="folder, or .gguf file, to write; must not exist, unless --force is given"
    )
    add_destination(sub, [*OTHER_FORMATS, GGUF])

    sub = command("inspect", run_inspect, "List every weight of a model: shape, bits, bytes.")
    sub.add_argument("path", type=_path, help=MODEL)

    add_verbose(sub)

    sub = command("perplexity", run_perplexity, "Measure a model's perplexity on a text, by sliding window.")
    sub.add_argument("path", type=_path, help=MODEL)
    add_text(sub)
    sub.add_argument("--stride", type=int, default=512, help="tokens from one window to the next")
    add_activations(sub, OTHERWISE)

    sub = command(
        "compare",
        run_compare,
        "Compare a quantized model with the one that it was made of: size, speed, perplexity, divergence.",
    )
    sub.add_argument("path", type=_path, help=MODEL)
    sub.add_argument(
        "reference", type=_path, help="the model that it was made of, likewise; both are in memory"
    )
    add_text(sub)
    sub.add_argument("--draw", metavar="FILE", type=_path, help="draw it, as PNG or SVG")
    sub.add_argument("--force", action="store_true", help="replace that file")
    add_activations(sub, f"{OTHERWISE}; of path, not of reference")

    sub = command(
        "evaluate",
        run_evaluate,
        "Score a model in zero-shot tasks, alone or beside another, by lm-evaluation-harness.",
    )
    sub.add_argument("path", type=_path, help=MODEL)
    sub.add_argument(
        "--tasks",
        metavar="LIST",
        type=_tasks,
        default="lambada,hellaswag,arc_easy,arc_challenge,piqa,winogrande",
        help="comma-separated names of the harness, or perplexity",
    )
    sub.add_argument(
        "--against",
        metavar="FOLDER",
        type=_path,
        help="a model of which to give the recovery rate, scored on the same items",
    )
    sub.add_argument("--limit", metavar="N", type=_positive, help="use only the first items of each task")
    sub.add_argument(
        "--data",
        metavar="FOLDER",
        type=_path,
        help="folder of TASK.jsonl, the rows of each dataset; else they come from the hub",
    )
    sub.add_argument("--batch-size", metavar="B", type=_positive, default=8, help="options scored at once")
    sub.add_argument(
        "--text",
        metavar="FILE",
        type=_path,
        help="UTF-8 text, for perplexity: windows of 1024 tokens, 512 apart",
    )
    sub.add_argument(
        "--max-tokens", metavar="T", type=_positive, help="use only the first tokens of the text"
    )
    add_activations(sub, f"{OTHERWISE}; of path, not of --against")

    sub = command("generate", run_generate, "Continue a prompt.")
    sub.add_argument("path", type=_path, help=MODEL)
    sub.add_argument("prompt", type=_text, help="text; the user's turn, if the model has a chat template")
    sub.add_argument("--raw", action="store_true", help="continue the text as it is, without a chat template")
    add_sampling(sub, 64)
    sub.add_argument(
        "--compile", action="store_true", help="compile the decoding step first, which takes about a minute"
    )
    add_activations(sub, OTHERWISE)

    sub = command("chat", run_chat, "Talk with a model.")
    sub.add_argument("path", type=_path, help=MODEL)
    sub.add_argument("--system", metavar="TEXT", type=_text, help="what it is told before all else")
    add_sampling(sub, 512)
    add_activations(sub, OTHERWISE)

    sub = command("serve", run_serve, "Serve a model by transformers, as OpenAI's API has it.")
    sub.add_argument("path", type=_path, help=MODEL)
    sub.add_argument("--host", default="localhost", help="address to listen at")
    sub.add_argument("--port", type=_port, default=8000, help="port to listen at")

    sub = command("explain", run_explain, "Say which kernel runs a layer, and why each other does not.")
    add_format(sub)
    add_activations(sub, "what the weight rounds its activations to")
    sub.add_argument("--op", default="linear", help="linear, linear_dx, grouped, embedding, quantize, ...")
    sub.add_argument("--device", type=_device_argument, default="cpu", help="device of the weight")
    sub.add_argument("--dtype", choices=DTYPE_NAMES, default="bfloat16", help="dtype of the activations")
    sub.add_argument("--m", type=int, default=1, help="rows of activations")
    sub.add_argument("--n", type=int, default=4096, help="out_features")
    sub.add_argument("--k", type=int, default=4096, help="in_features")

    sub = command(
        "tune",
        run_tune,
        "Measure how the GPU's kernels are best launched, for a model or sizes of weights, and remember it.",
    )
    sub.add_argument(
        "--model",
        metavar="FOLDER",
        type=_path,
        action="append",
        default=[],
        help="folder of a float model: all its linear layers; may repeat",
    )
    sub.add_argument(
        "--size",
        metavar="NxK",
        type=_size,
        action="append",
        default=[],
        help="out_features x in_features; may repeat",
    )
    add_format(sub)
    sub.add_argument(
        "--tokens", metavar="M", type=_positive, nargs="+", default=TOKENS, help="rows of activations"
    )
    sub.add_argument("--dtype", choices=DTYPE_NAMES, default="bfloat16", help="dtype of the activations")
    sub.add_argument("--device", default="cuda", help="GPU to measure on")
    return top
