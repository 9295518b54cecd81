"""What a server under load did, in Markdown."""

from benchmarks.serving_report import markdown, medians, turn

RESULT = {  # of what `vllm bench serve` gives
    "request_throughput": 2.5,
    "output_throughput": 80.0,
    "p50_ttft_ms": 100.0,
    "p99_ttft_ms": 250.4,
    "p50_tpot_ms": 20.04,
    "p99_tpot_ms": 30.0,
}


def test_the_median_of_the_turns_is_shown():
    rows = []
    for users, throughputs in ((1, (1.0, 9.0, 2.0)), (16, (5.0, 4.0, 6.0))):
        turns = [turn(RESULT | {"request_throughput": throughput}) for throughput in throughputs]
        rows.append({"weights": "int4", "users": users, **medians(turns)})
    text = markdown({"servers": {"int4": {"loaded": 2_345_600_000}}, "rows": rows})
    assert (
        text
        == """\
| requests per second | 1 user | 16 users | MB at most |
|---|---|---|---|
| int4 | 2.00 | 5.00 | 2346 |

| first token, ms, p50 / p99 | 1 user | 16 users |
|---|---|---|
| int4 | 100 / 250 | 100 / 250 |

| each token after it, ms, p50 / p99 | 1 user | 16 users |
|---|---|---|
| int4 | 20.0 / 30.0 | 20.0 / 30.0 |"""
    )
