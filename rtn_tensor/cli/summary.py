"""A report in some ten lines: by kind of layer."""

from collections import defaultdict
from collections.abc import Sequence

from rtn_tensor.quantize.plan import last_part
from rtn_tensor.quantize.report import Report, Row
from rtn_tensor.text_table import table

MOST = 9  # kinds that have a line of their own
HEADER = ["layers", "count", "bits", "group", "before", "after", "note"]


def summary(found: Report) -> str:
    """A line for each kind of layer, by its module's name, format and note; of many, those that share the
    last two."""
    kinds: dict[tuple, list[Row]] = defaultdict(list)
    for row in found.rows:
        if len(row.shape) > 1:
            kinds[last_part(row.name), row.bits, row.group_size, row.note].append(row)
    if len(kinds) > MOST:
        merged: dict[tuple, list[Row]] = defaultdict(list)
        for (_, *same), rows in kinds.items():
            merged[tuple(same)] += rows
        kinds = {("", *same): rows for same, rows in merged.items()}
    lines = [_line(_names(rows), rows, rows[0].note) for rows in kinds.values()]
    if vectors := [row for row in found.rows if len(row.shape) < 2]:
        lines.append(_line("vectors", vectors, "norms and biases"))
    total = _line("total", found.rows, "")
    total[2] = f"{found.bits_per_weight:.2f}"
    return table(HEADER, [*lines, total])


def _names(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(last_part(row.name) for row in rows))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _line(names: str, rows: Sequence[Row], note: str) -> list[str]:
    from rich.filesize import decimal

    first = rows[0]
    bits, group = ("float", "") if first.bits is None else (str(first.bits), str(first.group_size))
    before, after = (
        decimal(sum(getattr(row, key) for row in rows)) for key in ("bytes_before", "bytes_after")
    )
    return [names, str(len(rows)), bits, group, before, after, note]
