"""What `gpu.py` measured, in words: tables, and how it compares with the targets."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from benchmarks.gpu_peers import CUBLAS, GROUPED_MM
from rtn_tensor.text_table import table

Results = dict[str, Any]
Found = list[tuple[str, float]]  # where, and what was measured there
MAIN = ((8192, 8192), (4096, 4096))
MAIN_KERNELS = ("rtn int4 g128", "rtn int8 g128")
# Rows of x that tables have no column for, so that the report stays under 12,000 characters.
LEFT_OUT = (2, 512)


class Target(NamedTuple):
    """`found` says what counts; the worst of it must reach `needed`, or where `at_most`, not pass it."""

    what: str
    needed: float
    found: Callable[[Results], Found]
    at_most: bool = False


def linear_rows(
    kernel: str, shape: tuple[int, int], low: int, high: float, clock: str, key: str
) -> Callable[[Results], Found]:
    def found(results: Results) -> Found:
        rows = [
            r
            for r in results["linear"]
            if r["kernel"] == kernel and (r["N"], r["K"]) == shape and low <= r.get("M", 0) <= high
        ]
        return [(f"M={r['M']}", r[clock][key]) for r in rows if key in r.get(clock, {})]

    return found


def of_copy(results: Results) -> Found:
    found = linear_rows("rtn int4 g128", (8192, 8192), 1, 16, "graph", "bytes_per_s")(results)
    ceiling = results["ceilings"].get("copy_bytes_per_s")
    return [(where, value / ceiling) for where, value in found] if ceiling else []


def over_bf16(results: Results, row: dict) -> float | None:
    """How many times as fast as the same with bf16 weights."""
    same = ("what", "batch", "tokens")
    for other in results["model"]:
        if other["weights"] == "bf16" and all(other[key] == row[key] for key in same):
            return other["seconds"] / row["seconds"]
    return None


def decoding(results: Results) -> Found:
    rows = [
        r for r in results["model"] if (r["what"], r["weights"], r["batch"]) == ("decode", "int4 g128", 1)
    ]
    return [("", ratio) for r in rows if (ratio := over_bf16(results, r)) is not None]


def extra_memory(results: Results) -> Found:
    return [
        (r["weights"], r["extra_bytes"] / r["allowed_extra_bytes"])
        for r in results["load"]
        if "extra_bytes" in r
    ]


def wrong(results: Results) -> list[str]:
    """All that says that a kernel of ours is not right, or could not be looked at."""
    found = [f"{check['check']}: {check['error']}" for check in results["correctness"]["failed"]]
    for e in results["errors"]:
        ours = e["section"] in ("moe", "model", "load") or e["name"].endswith(", ours")
        # What takes too long is not wrong.
        if e["section"] == "correctness" or (ours and not e["error"].startswith("killed")):
            found.append(f"{e['name']}: {e['error']}")
    for section in ("linear", "moe"):
        for r in results[section]:
            if "error" in r and r["kernel"].startswith("rtn"):
                size = f"{r['N']}x{r['K']}" if section == "linear" else r["model"]
                found.append(f"{r['kernel']}, {size}, {r.get('M', r.get('tokens', 'made'))}: {r['error']}")
    return found


def over_cublas(kernel: str, shape: tuple[int, int], low: int, high: float, needed: float) -> Target:
    where = f"M <= {high}" if low == 1 else f"M = {low}" if low == high else f"M >= {low}"
    what = f"{kernel} {shape[0]}x{shape[1]}, {where}, do_bench: over cuBLAS"
    return Target(what, needed, linear_rows(kernel, shape, low, high, "do_bench", "over_cublas"))


EVER = float("inf")
TARGETS = [
    over_cublas("rtn int4 g128", (8192, 8192), 1, 16, 2.3),
    Target("rtn int4 g128 8192x8192, M <= 16, graph: bytes/s over a copy's", 0.5, of_copy),
    over_cublas("rtn int4 g128", (8192, 8192), 32, 32, 1.9),
    over_cublas("rtn int4 g128", (8192, 8192), 64, 64, 1.6),
    over_cublas("rtn int4 g128", (8192, 8192), 128, 128, 1.25),
    over_cublas("rtn int4 g128", (8192, 8192), 256, EVER, 0.95),
    over_cublas("rtn int4 g128", (4096, 4096), 1, 8, 2.3),
    over_cublas("rtn int8 g128", (8192, 8192), 1, 16, 1.6),
    over_cublas("rtn int8 g128", (8192, 8192), 256, EVER, 0.95),
    Target("Llama 8B, decoding at batch 1, int4 g128: over bf16", 2.2, decoding),
    Target("load: bytes above the model over largest tensor + 64 MiB", 1.0, extra_memory, at_most=True),
]


def compared(results: Results) -> list[dict[str, Any]]:
    """Each target with the worst that was measured for it; `met` is None where nothing was."""
    rows = []
    for target in TARGETS:
        found = target.found(results)
        row: dict[str, Any] = {"target": target.what, "needed": target.needed, "at_most": target.at_most}
        if not found:
            rows.append(row | {"measured": None, "at": None, "met": None})
            continue
        at, value = (max if target.at_most else min)(found, key=lambda each: each[1])
        met = value <= target.needed if target.at_most else value >= target.needed
        rows.append(row | {"measured": value, "at": at, "met": met})
    return rows


# ---------------------------------------------------------------------------------- tables


def columns(rows: Iterable[dict], key: str) -> list[int]:
    return sorted({r[key] for r in rows if key in r and not (key == "M" and r[key] in LEFT_OUT)})


def cell(row: dict | None, clock: str, key: str, form: str = "{:.2f}", times: float = 1) -> str:
    """What a table has of a row: "x" an error, "-" not measured."""
    if row is None or "skipped" in row:
        return "-"
    if "error" in row or "error" in row.get(clock, {}):
        return "x"
    return form.format(row[clock][key] * times) if key in row.get(clock, {}) else "-"


def linear_table(results: Results, shape: tuple[int, int]) -> str:
    rows = [r for r in results["linear"] if (r["N"], r["K"]) == shape]
    tokens = columns(rows, "M")
    by = {(r["kernel"], r.get("M")): r for r in rows}
    kernels = list(dict.fromkeys(r["kernel"] for r in rows))

    def line(
        label: str, kernel: str, clock: str, key: str, form: str = "{:.2f}", times: float = 1
    ) -> list[str]:
        return [
            label,
            *(cell(by.get((kernel, m), by.get((kernel, None))), clock, key, form, times) for m in tokens),
        ]

    lines = [line("cuBLAS us, do_bench", CUBLAS, "do_bench", "seconds", "{:.1f}", 1e6)]
    lines += [line(kernel, kernel, "do_bench", "over_cublas") for kernel in kernels if kernel != CUBLAS]
    lines.append(line("cuBLAS us, graph", CUBLAS, "graph", "seconds", "{:.1f}", 1e6))
    ceilings = results["ceilings"]
    for kernel in MAIN_KERNELS:
        if kernel in kernels:
            lines.append(line(f"{kernel}, graph", kernel, "graph", "over_cublas"))
            if ceilings:
                lines.append(
                    line(
                        "  % of a copy's bytes/s",
                        kernel,
                        "graph",
                        "bytes_per_s",
                        "{:.0f}",
                        100 / ceilings["copy_bytes_per_s"],
                    )
                )
                lines.append(
                    line(
                        "  % of the ceiling's FLOP/s",
                        kernel,
                        "graph",
                        "flop_per_s",
                        "{:.0f}",
                        100 / ceilings["matmul_flop_per_s"],
                    )
                )
    return f"Weight {shape[0]}x{shape[1]}: times as fast as cuBLAS bf16, by rows of x\n" + table(
        ["kernel", *map(str, tokens)], lines
    )


def other_shapes_table(results: Results, shapes: list[tuple[int, int]]) -> str:
    rows = [r for r in results["linear"] if (r["N"], r["K"]) in shapes]
    tokens = columns(rows, "M")
    by = {(r["kernel"], r["N"], r["K"], r.get("M")): r for r in rows}
    lines = []
    for shape in shapes:
        for kernel in MAIN_KERNELS:
            cells = [cell(by.get((kernel, *shape, m)), "do_bench", "over_cublas") for m in tokens]
            lines.append([f"{shape[0]}x{shape[1]} {kernel}", *cells])
    return "Other weights: times as fast as cuBLAS bf16, by rows of x, do_bench\n" + table(
        ["weight and kernel", *map(str, tokens)], lines
    )


def moe_table(results: Results) -> str:
    rows = results["moe"]
    tokens = columns(rows, "tokens")
    by = {(r["model"], r["kernel"], r.get("what"), r.get("tokens")): r for r in rows}
    lines = []
    for model, kernel, what in dict.fromkeys((r["model"], r["kernel"], r.get("what", "layer")) for r in rows):
        dense = kernel == GROUPED_MM
        if what != "layer" and dense:
            continue
        label = (
            f"{model}, {kernel}, us" if dense else f"  {kernel}" if what == "layer" else "    sorted before"
        )
        key, form, times = ("seconds", "{:.0f}", 1e6) if dense else ("over_grouped_mm", "{:.2f}", 1)
        found = [by.get((model, kernel, what, t), by.get((model, kernel, None, None))) for t in tokens]
        lines.append([label, *(cell(row, "graph", key, form, times) for row in found)])
    return "Experts' layers: times as fast as bf16, by tokens, graph\n" + table(
        ["layer and kernel", *map(str, tokens)], lines
    )


def model_table(results: Results) -> str:
    lines = []
    for r in results["model"]:
        ratio = over_bf16(results, r)
        what = f"{r['what']}, {r['tokens']} tokens"
        speed = [f"{1e3 * r['seconds']:.2f}", f"{r['tokens_per_s']:,.0f}", f"{r['bytes_per_s'] / 1e9:,.0f}"]
        lines.append([what, r["weights"], str(r["batch"]), *speed, "-" if ratio is None else f"{ratio:.2f}"])
    return "Llama 8B, random weights\n" + table(
        ["what", "weights", "batch", "ms", "tokens/s", "GB/s of weights", "over bf16"], lines
    )


def load_table(results: Results) -> str:
    lines = []
    for r in results["load"]:
        size = [f"{r[key] / 1e6:,.0f}" for key in ("finished_bytes", "extra_bytes", "allowed_extra_bytes")]
        lines.append([r["weights"], str(r["run"]), *size, f"{r['seconds']:.2f}", f"{r['read_seconds']:.2f}"])
    header = ["weights", "run", "model MB", "above it MB", "allowed MB", "seconds", "floats read in"]
    return f"load, {results['load'][0]['checkpoint_bytes'] / 1e9:.2f} GB of bf16\n" + table(header, lines)


def targets_table(rows: list[dict]) -> str:
    lines = []
    for r in rows:
        verdict = {True: "met", False: "MISSED", None: "not measured"}[r["met"]]
        measured = (
            "-" if r["measured"] is None else f"{r['measured']:.2f}" + (f" at {r['at']}" if r["at"] else "")
        )
        lines.append([r["target"], f"{'<=' if r['at_most'] else '>='} {r['needed']:g}", measured, verdict])
    return table(["target", "needed", "worst measured", ""], lines)


def few(header: str, lines: list[str], most: int) -> str:
    more = [f"  ... and {len(lines) - most} more, in the JSON"] if len(lines) > most else []
    return "\n".join([header, *(f"  {line[:160]}" for line in lines[:most]), *more])


def text(results: Results) -> str:
    """The whole report, what matters most last."""
    about, ceilings, correctness = results["machine"], results["ceilings"], results["correctness"]
    versions = ", ".join(f"{name} {v}" for name, v in about.get("versions", {}).items() if v)
    parts = [f"{about.get('gpu', 'GPU')}, driver {about.get('driver')}, CUDA {about.get('cuda')}; {versions}"]
    if ceilings:
        copy, matmul = ceilings["copy_bytes_per_s"] / 1e12, ceilings["matmul_flop_per_s"] / 1e12
        parts[0] += f"\ncopy {copy:.2f} TB/s, read and written; 8192^3 bf16 product {matmul:.0f} TFLOP/s"
    shapes = list(dict.fromkeys((r["N"], r["K"]) for r in results["linear"]))
    parts += [linear_table(results, shape) for shape in shapes if shape in MAIN]
    if others := [shape for shape in shapes if shape not in MAIN]:
        parts.append(other_shapes_table(results, others))
    if results["moe"]:
        parts.append(moe_table(results))
    if results["model"]:
        parts.append(model_table(results))
    if results["load"]:
        parts.append(load_table(results))
    bad = wrong(results)
    errors = [
        f"{e['section']}, {e['name']}: {e['error']}"
        for e in results["errors"]
        if f"{e['name']}: {e['error']}" not in bad
    ]
    for r in (*results["linear"], *results["moe"]):
        for found in (r, *(r.get(clock, {}) for clock in ("graph", "do_bench"))):
            if "error" in found and not r["kernel"].startswith("rtn"):
                errors.append(f"{r['kernel']}: {found['error']}")
    if errors:
        parts.append(few("Errors of other kernels, and of whole jobs:", list(dict.fromkeys(errors)), 6))
    if skipped := [f"{s['section']}, {s['name']}: {s['why']}" for s in results["skipped"]]:
        parts.append(few("Skipped:", skipped, 4))
    counts = f"{correctness['passed']} checks passed, {len(bad)} failed, {correctness['skipped']} skipped"
    checked = f"Correctness: {counts}"
    parts.append(few(checked + (":" if bad else ""), bad, 8))
    parts.append(targets_table(results["targets"]))
    return "\n\n".join(parts)
