"""Plain-text tables for reports.

rich, which draws the bars, takes 3 s for a report of 5000 weights, and cuts their names where a terminal is
narrow; these lines take 10 ms.
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    """Lines of `header`, a rule and `rows`, in columns: numbers to the right, text and the first column to
    the left."""
    lines = [list(header), [""] * len(header), *map(list, rows)]
    for i, column in enumerate(zip(*lines, strict=True)):
        width = max(map(len, column))
        numbers = i > 0 and any(cell[:1].isdigit() for cell in column[2:])
        for line in lines:
            line[i] = line[i].rjust(width) if numbers else line[i].ljust(width)
        lines[1][i] = "-" * width
    return "\n".join("  ".join(line).rstrip() for line in lines)
