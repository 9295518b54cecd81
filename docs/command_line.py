"""Writes the second half of docs/command-line.md, what each command takes, from the parser itself.

What stands above it there is written by hand.

python docs/command_line.py
"""

import os
from pathlib import Path

PAGE = Path(__file__).with_name("command-line.md")
MARK = "<!-- From here on docs/command_line.py writes this page. -->\n"


def generated() -> str:
    """Every command's help, 100 columns wide."""
    from rtn_tensor.cli import parser

    before = {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR")}
    os.environ.update(COLUMNS="100", NO_COLOR="1")
    try:
        (commands,) = (action.choices for action in parser()._subparsers._group_actions)
        return "".join(f"\n## {name}\n\n```text\n{sub.format_help()}```\n" for name, sub in commands.items())
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {name: value} if value is not None else {}


def page() -> str:
    by_hand, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    return by_hand + (mark or MARK) + generated()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
