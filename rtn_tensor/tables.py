"""Plain-text tables for reports."""


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns padded to line up: the first to the left, numbers (and so every other column) to the right, a last long one not at all."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in [header, ["-" * w for w in widths], *rows]:
        cells = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
