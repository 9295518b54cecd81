"""vLLM's server under load: bf16, this library's int8 and int4, and vLLM's own int4 from a compressed-tensors
folder of the same weights, with 1 to 64 users at once.

    python -m benchmarks.serving_load [--weights NAME ...] [--users 1 4 16 64] [--prompts 12] [--output 32]
                                      [--rounds 3] [--json FILE]
    python -m benchmarks.serving_load --soak 600 [--weights int4] [--json FILE]

To be run where vLLM is installed (`make test-serving` makes such an environment for CPUs, .venv-vllm). All
servers are started first, and then take turns, as an idle one takes no time; what a turn measures is vLLM's
own `vllm bench serve`. The model is SmolLM2-135M-Instruct; the prompts are pieces of State of the Union
speeches, of some 15 to 450 tokens. A user sends the next request when the last one is answered.

The soak gives one server 16 users for so many seconds, and fails where a request is lost, or where the server
does not end as it should.
"""

import argparse
import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gptq_checkpoint import GROUP_SIZE
from benchmarks.machine import machine
from benchmarks.real_data import state_of_the_union
from benchmarks.real_model import smollm2
from benchmarks.serving_report import markdown, medians, turn
from benchmarks.vllm_server import Server
from rtn_tensor import export, load, rtn_int4

EXPORTED = "int4 by vLLM"
# The options of this library, or None where it is not to be used.
CONFIGS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int4, int8 activations": {"bits": 4, "activations": "int8"},
    EXPORTED: None,
}
SHORTEST, LONGEST = 64, 2048  # characters of a prompt, whose lengths are spread evenly on a logarithmic scale
SOAK_USERS = 16
INTERVAL = 1.0  # seconds between two looks at the memory


def write_prompts(to: Path, count: int) -> Path:
    """A file of the format of ShareGPT, which `vllm bench serve` reads."""
    text, chance = state_of_the_union(), random.Random(0)
    pieces = []
    for _ in range(count):
        length = round(SHORTEST * (LONGEST / SHORTEST) ** chance.random())
        start = text.index(" ", chance.randrange(len(text) - LONGEST - 100)) + 1
        pieces.append(text[start : start + length].strip())
    # The answers are not read, as --output-len says how long they are to be.
    talks = [{"conversations": [{"value": piece}, {"value": ""}]} for piece in pieces]
    to.write_text(json.dumps(talks), encoding="utf-8")
    return to


def start(name: str, model: Path, work: Path, users: int) -> Server:
    """The server of one of `CONFIGS`. No prefix is kept, so that each turn computes its prompts anew."""
    options = ["--served-model-name", "model", "--dtype", "bfloat16", "--max-model-len", "1024"]
    options += ["--max-num-seqs", str(users), "--no-enable-prefix-caching", "--seed", "0"]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    config = CONFIGS[name]
    if config is None:
        env["VLLM_PLUGINS"] = ""
    else:
        config = {"quant_method": "rtn", "group_size": GROUP_SIZE, **config}
        options += ["--hf-overrides", json.dumps({"quantization_config": config})]
    if name == EXPORTED:
        folder = work / "exported"
        export(load(model, rtn_int4(GROUP_SIZE, "absmax"), dtype=torch.bfloat16), folder)
        model = folder
    return Server(model, work / name.replace(" ", "-"), options, env)


def bench(
    server: Server, model: Path, prompts: Path, users: int, requests: int, output: int
) -> dict[str, Any]:
    """What `vllm bench serve` gives, run in this process, whose imports take longer than many a turn."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    command = ["--base-url", server.url, "--model", "model", "--tokenizer", str(model)]
    command += ["--dataset-name", "sharegpt", "--dataset-path", str(prompts), "--disable-shuffle"]
    command += ["--num-prompts", str(requests), "--max-concurrency", str(users), "--output-len", str(output)]
    command += ["--ignore-eos", "--temperature", "0", "--metric-percentiles", "50,99", "--disable-tqdm"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        result = main(parser.parse_args(command))
    lost = requests - result["completed"]
    if lost or result["total_output_tokens"] != requests * output:
        raise RuntimeError(
            f"{lost} of {requests} requests were lost, and {result['total_output_tokens']} tokens came, not "
            f"{requests * output}:\n{said.getvalue()[-4000:]}\n{server.said()[-4000:]}"
        )
    return result


@contextlib.contextmanager
def watched(server: Server) -> Iterator[list[tuple[float, int]]]:
    """Samples (seconds, bytes of memory) of the server's processes."""
    samples, done, started = [(0.0, server.memory())], threading.Event(), time.monotonic()

    def watch() -> None:
        while not done.wait(INTERVAL):
            samples.append((round(time.monotonic() - started, 1), server.memory()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield samples
    finally:
        done.set()
        watcher.join()


def under_load(args: argparse.Namespace, model: Path, work: Path, publish: Callable[[dict], None]) -> None:
    """Gives the results so far to `publish` after each round."""
    counts = {users: max(args.prompts, 3 * users // 2) for users in args.users}
    prompts = write_prompts(work / "prompts.json", max(counts.values()))
    servers, about, turns = {}, {}, {}
    with contextlib.ExitStack() as stack:
        for name in args.weights:
            servers[name] = server = start(name, model, work, max(args.users))
            stack.callback(server.kill)
        for name, server in servers.items():
            seconds = server.wait_until_ready()
            about[name] = {"ready": server.memory()}
            print(f"{name}: ready after {seconds:.0f} s", flush=True)
        for server in servers.values():  # whose first requests are slower
            bench(server, model, prompts, max(args.users), max(args.users), args.output)
        for done in range(args.rounds):
            for users, requests in counts.items():
                for name, server in servers.items():
                    with watched(server) as samples:
                        result = bench(server, model, prompts, users, requests, args.output)
                    most = max(memory for _, memory in samples)
                    about[name]["loaded"] = max(about[name].get("loaded", 0), most)
                    turns.setdefault((name, users), []).append(turn(result))
                    print(
                        f"round {done + 1}, users: {users}, {name}: {result['duration']:.1f} s, "
                        f"{result['request_throughput']:.2f} requests per second",
                        flush=True,
                    )
            rows = [
                {"weights": name, "users": users, "requests": counts[users], **medians(found), "turns": found}
                for (name, users), found in turns.items()
            ]
            publish({"rounds": done + 1, "servers": about, "rows": rows})
        for name, server in servers.items():
            about[name]["exit_code"] = server.stop()
    publish({"rounds": args.rounds, "servers": about, "rows": rows})
    print(f"\n{markdown({'servers': about, 'rows': rows})}")


def soak(args: argparse.Namespace, model: Path, work: Path, publish: Callable[[dict], None]) -> None:
    (name,) = args.weights
    server = start(name, model, work, SOAK_USERS)
    try:
        print(f"{name}: ready after {server.wait_until_ready():.0f} s", flush=True)
        # How many requests will take so long: as many a second as these first ones, which warm it up, too.
        prompts = write_prompts(work / "prompts.json", 4 * SOAK_USERS)
        first = bench(server, model, prompts, SOAK_USERS, 4 * SOAK_USERS, args.output)
        requests = max(SOAK_USERS, round(args.soak * first["request_throughput"]))
        prompts = write_prompts(work / "prompts.json", requests)
        with watched(server) as samples:
            result = bench(server, model, prompts, SOAK_USERS, requests, args.output)
        code, left = server.stop(), [process.name() for process in server.left()]
    finally:
        server.kill()
    kept = samples[:: -(-len(samples) // 20)]
    publish(
        {"weights": name, "users": SOAK_USERS, "seconds": result["duration"], "requests": requests}
        | {"lost": 0, **turn(result), "memory": kept, "exit_code": code, "left": left}
    )
    print(f"{requests} requests in {result['duration']:.0f} s, none lost")
    print("MB: " + ", ".join(f"{memory / 1e6:.0f} at {seconds:.0f} s" for seconds, memory in kept))
    print(f"exit code {code}, processes left: {', '.join(left) or 'none'}")
    if code or left:
        raise SystemExit("the server did not end as it should")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving_load", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument(
        "--weights", nargs="+", choices=CONFIGS, metavar="NAME", help=f"of {'; '.join(CONFIGS)}"
    )
    parser.add_argument("--users", type=int, nargs="+", default=[1, 4, 16, 64], metavar="U", help="at once")
    parser.add_argument(
        "--prompts",
        type=int,
        default=12,
        metavar="N",
        help="requests of a turn, but at least three for two users (default: 12)",
    )
    parser.add_argument("--output", type=int, default=32, metavar="N", help="tokens of each (default: 32)")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="R", help="of which the median is taken (default: 3)"
    )
    parser.add_argument(
        "--soak", type=int, metavar="SECONDS", help="give one server so many seconds of 16 users instead"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the results, the machine and the versions there"
    )
    args = parser.parse_args()
    args.weights = args.weights or (["int4"] if args.soak else list(CONFIGS))
    if args.soak and len(args.weights) > 1:
        parser.error("--soak takes one of --weights")
    # So that the servers end with this process, whoever ends it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    model, started = smollm2(), time.monotonic()
    setting = {
        "model": model.name,
        "output": args.output,
        "group_size": GROUP_SIZE,
        "characters": [SHORTEST, LONGEST],
    }

    def publish(found: dict[str, Any]) -> None:
        if args.json:
            whole = {"machine": machine() | engine(), **setting, **found}
            args.json.write_text(json.dumps(whole, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as work:
        (soak if args.soak else under_load)(args, model, Path(work), publish)
    print(f"\nAll of it took {time.monotonic() - started:.0f} s", file=sys.stderr)


def engine() -> dict[str, Any]:
    """The version of vLLM, the cores that it was told to take, and whether the CPU has AMX: where it has,
    vLLM's own int4 rounds activations to int8."""
    try:
        found = {"vllm": version("vllm")}
    except PackageNotFoundError:
        found = {"vllm-cpu": version("vllm-cpu")}
    bind = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    return found | {"omp_threads_bind": bind, "amx": torch.cpu._is_amx_tile_supported()}


if __name__ == "__main__":
    main()
