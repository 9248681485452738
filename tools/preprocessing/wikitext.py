"""WikiText files: their headings, and their tokenised punctuation turned back into prose."""

from __future__ import annotations

import re

# (text, replacement) in the order they are applied; most undo the spaces WikiText puts around punctuation
_BEFORE_BRACKETS = (
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" .", "."),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
)
_ENCLOSED = (
    (re.compile(r"\(\s*([^)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r"\"\s*([^\"]*?)\s*\""), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
)
_AFTER_BRACKETS = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def is_wikitext_heading(line: str) -> bool:
    """Return whether `line` is a heading: it starts and ends with `=`."""
    line = line.strip()
    return line.startswith("=") and line.endswith("=")


def wikitext_clean(text: str) -> str:
    """Return `text` with WikiText's separated punctuation, numbers and brackets joined again.

    `the film 's budget , 1 @.@ 5 million ( US )` becomes `the film's budget, 1.5 million (US)`. `N`, which stands for a
    number in WikiText's predecessor, becomes 1.
    """
    for old, new in _BEFORE_BRACKETS:
        text = text.replace(old, new)
    for pattern, replacement in _ENCLOSED:
        text = pattern.sub(replacement, text)
    for old, new in _AFTER_BRACKETS:
        text = text.replace(old, new)
    return text
