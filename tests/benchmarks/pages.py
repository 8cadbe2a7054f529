"""Writes what a benchmark found into its page of the guide."""

import re
from pathlib import Path

GUIDE = Path(__file__).resolve().parents[2] / "examples" / "guide"


def write(page, command, found):
    """Puts text between the comment that names ``tests/benchmarks/<command>.py --write`` and the
    end of its block."""
    start = f"<!-- {command}: python tests/benchmarks/{command}.py --write -->\n"
    path = GUIDE / page
    text = path.read_text()
    block = re.search(re.escape(start) + r"(?:.*\n)*?<!-- end -->", text)
    if block is None:
        raise SystemExit(f"{page} has no place for the table of {command}.py")
    path.write_text(text.replace(block[0], f"{start}{found}\n<!-- end -->"))
