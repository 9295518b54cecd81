"""`rtn-tensor generate`, `chat` and `serve`."""

import argparse
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from rtn_tensor.cli.models import load_model, local, tokenizer_of
from rtn_tensor.cli.screen import say
from rtn_tensor.evaluation.generation import Generation, Sampling, generate
from rtn_tensor.integrations.transformers.folders import check_model_folder

LEAVE = "/bye", "/exit", "/quit"


def _sampling(args: argparse.Namespace) -> Sampling | None:
    if args.temperature is None:
        if args.top_p is not None or args.seed is not None:
            raise ValueError("--top-p and --seed are for sampling; add --temperature, or leave them out")
        return None
    return Sampling(args.temperature, 1.0 if args.top_p is None else args.top_p, args.seed)


def _rate(found: Generation) -> str:
    return f"{found.tokens} tokens in {found.seconds:.1f} s, {found.tokens_per_second:.1f} tokens per second"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def run_generate(args: argparse.Namespace) -> tuple[Any, str]:
    how = _sampling(args)
    tokenizer = tokenizer_of(args.path)  # before the model, which takes longer
    model = load_model(args.path, args.activations)
    on_text: Callable[[str], None] | None = None if args.json else _write
    result = generate(
        model,
        tokenizer,
        args.prompt,
        args.max_new_tokens,
        args.compile,
        raw=args.raw,
        sampling=how,
        on_text=on_text,
    )
    if on_text:
        _write("\n")
    say(_rate(result))
    return {"text": result.text, "tokens": result.tokens, "seconds": result.seconds}, ""


def run_chat(args: argparse.Namespace) -> tuple[Any, str]:
    how = _sampling(args)
    tokenizer = tokenizer_of(args.path)
    if not tokenizer.chat_template:
        raise ValueError(f"{args.path} has no chat template; use generate, which continues a text")
    model = load_model(args.path, args.activations)
    begin = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(begin)
    said: list[str] = []

    def on_text(piece: str) -> None:
        said.append(piece)
        _write(piece)

    say(f"/clear begins anew; {LEAVE[0]}, or the end of the input, leaves; Ctrl-C ends a reply")
    while (line := _ask()) is not None and line.strip() not in LEAVE:
        if line.strip() == "/clear":
            messages = list(begin)
        elif line.strip():
            messages.append({"role": "user", "content": line})
            said.clear()
            try:
                reply = generate(
                    model, tokenizer, messages, args.max_new_tokens, sampling=how, on_text=on_text
                )
            except KeyboardInterrupt as stop:  # a reply that is too long
                if not sys.stdin.isatty() or stop.args != (signal.SIGINT,):
                    raise
                _write("\n")
                messages.append({"role": "assistant", "content": "".join(said)})
                continue
            except ValueError as error:  # such as a chat that has become too long, which can be cleared
                messages.pop()
                say(f"rtn-tensor: {error}")
                continue
            _write("\n")
            say(_rate(reply))
            messages.append({"role": "assistant", "content": reply.text})
    return {"messages": messages}, ""


def _ask() -> str | None:
    """A line of the standard input; None at its end."""
    if sys.stdin is None:
        return None
    if sys.stdin.isatty():
        import readline  # noqa: F401  (which gives `input` a history)
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _check_free(host: str, port: int) -> None:
    """Before the model is looked at: uvicorn tells it last, and in a log."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ValueError(
            f"cannot listen at {host}:{port} ({why}); choose another --port or --host"
        ) from error


def run_serve(args: argparse.Namespace) -> tuple[Any, str]:
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers.cli.serve import Serve

    _check_free(args.host, args.port)
    place = local(args.path)
    check_model_folder(place)
    tokenizer_of(args.path)
    os.makedirs(HF_HUB_CACHE, exist_ok=True)  # transformers' list of models fails where there is none
    say(f"Serving {args.path} at http://{args.host}:{args.port}/v1, under this name")
    Serve(force_model=args.path, host=args.host, port=args.port)
    return {}, ""
