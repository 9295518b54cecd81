"""What `benchmarks/serving_load.py` found, in Markdown for docs/serving.md."""

import statistics
from typing import Any

METRICS = {  # of `vllm bench serve` -> our name, and by how much to divide
    "request_throughput": ("requests_per_second", 1),
    "output_throughput": ("tokens_per_second", 1),
    "p50_ttft_ms": ("first_token_p50", 1e3),
    "p99_ttft_ms": ("first_token_p99", 1e3),
    "p50_tpot_ms": ("next_token_p50", 1e3),
    "p99_tpot_ms": ("next_token_p99", 1e3),
}


def turn(result: dict[str, Any]) -> dict[str, float]:
    """Of what `vllm bench serve` gives, what we keep; times in seconds."""
    return {name: result[metric] / by for metric, (name, by) in METRICS.items()}


def medians(turns: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}


def markdown(data: dict[str, Any]) -> str:
    """One table of requests per second and memory, and one of each time, by weights and users."""
    users = list(dict.fromkeys(row["users"] for row in data["rows"]))
    rows = {(row["weights"], row["users"]): row for row in data["rows"]}
    headers = ["1 user" if count == 1 else f"{count} users" for count in users]
    names = list(data["servers"])

    def table(title: str, cell, more: dict[str, str] | None = None) -> str:
        lines = [[title, *headers, *(["MB at most"] if more else [])]]
        lines.append(["---"] * len(lines[0]))
        for name in names:
            lines.append(
                [name, *(cell(rows[name, count]) for count in users), *([more[name]] if more else [])]
            )
        return "\n".join(
            f"| {' | '.join(line)} |" if line[0] != "---" else f"|{'|'.join(line)}|" for line in lines
        )

    def times(name: str, digits: int):
        return lambda row: f"{row[f'{name}_p50'] * 1e3:.{digits}f} / {row[f'{name}_p99'] * 1e3:.{digits}f}"

    memory = {name: f"{server['loaded'] / 1e6:.0f}" for name, server in data["servers"].items()}
    return "\n\n".join(
        [
            table("requests per second", lambda row: f"{row['requests_per_second']:.2f}", memory),
            table("first token, ms, p50 / p99", times("first_token", 0)),
            table("each token after it, ms, p50 / p99", times("next_token", 1)),
        ]
    )
