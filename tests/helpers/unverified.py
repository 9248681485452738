"""What has never run on an NPU, as docstrings say; `python -m tests.helpers.unverified` puts it in docs/ascend.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PAGE = REPO / "docs" / "ascend.md"
BEGIN, END = "<!-- unverified: begin -->\n", "<!-- unverified: end -->\n"
_SAYS_SO = re.compile(r"not verified|unverified", re.IGNORECASE)


def unverified() -> list[str]:
    """Return a line of Markdown for each class or function whose docstring says that it is not verified."""
    lines = []
    for file in sorted((REPO / "parallel_core").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in [tree, *ast.walk(tree)][1:]:
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                continue
            text = ast.get_docstring(node) or ""
            if _SAYS_SO.search(text):
                what = re.split(r"\.\s|\n", text, maxsplit=1)[0].rstrip(".")
                lines.append(f"- `{file.relative_to(REPO / 'parallel_core')}`, `{node.name}`: {what}.")
    return lines


def page_with(lines: list[str], text: str) -> str:
    """Return the page's text with this list in it."""
    before, rest = text.split(BEGIN, 1)
    return before + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    PAGE.write_text(page_with(unverified(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
