"""Every message of an error that this package raises, from its own source, as a page.

    python -m parallel_core.doctor.messages > docs/messages.md

What stands in braces is filled in when it is raised: the value, the key, the file.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from parallel_core import errors

PACKAGE = Path(__file__).resolve().parents[1]
KINDS = {
    name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)
}  # fmt: skip
HEAD = """# Messages

Every error that the package raises on purpose, by the file that raises it; what stands in braces is filled in. It says
what is wrong and, behind a semicolon or comma, what to do instead. The page is made from the source (`python -m
parallel_core.doctor.messages > docs/messages.md`), so it is complete: search it for a few words of the message at hand.
[Troubleshooting](troubleshooting.md) says what to do where a message does not.

"""


def messages(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, message) of the errors that a file raises or returns, and of the rules of the configuration."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        match node.func, node.args:
            case ast.Name(id=name), [first, *_] if name in KINDS:
                text = template(first)
            case ast.Attribute(value=ast.Name(id="r"), attr="fail"), [names, rule]:  # a rule's `Resolution`
                text = f"{template(names)} (given values): {template(rule)}"
            case _:
                continue
        if len(text.split()) > 1:
            yield node.lineno, text


def template(node: ast.expr) -> str:
    """Return a message as written, with the source of what is filled in between braces; "" for what has no words."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return "{" + ast.unparse(node.value) + "}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "" if not isinstance(node, (ast.Name, ast.Attribute, ast.Call)) else "{" + ast.unparse(node) + "}"


def page() -> str:
    """Return the page."""
    parts = [HEAD]
    for file in sorted(PACKAGE.rglob("*.py")):
        found = sorted(set(messages(file)))
        if found:
            parts.append(f"## `{file.relative_to(PACKAGE.parent)}`\n\n")
            parts += [f"- {_as_code(' '.join(text.split()))}\n" for _, text in found]
            parts.append("\n")
    return "".join(parts).rstrip() + "\n"


def _as_code(text: str) -> str:
    """Return text as Markdown code, whatever backticks are in it."""
    fence = "`" * (max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


if __name__ == "__main__":
    print(page(), end="")
