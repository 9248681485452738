"""WikiText files: their headings, and their tokenised punctuation turned back into prose."""

from __future__ import annotations

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
_ENCLOSED = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
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
    for opening, closing in _ENCLOSED:
        text = _without_inner_space(text, opening, closing)
    for old, new in _AFTER_BRACKETS:
        text = text.replace(old, new)
    return text


def _without_inner_space(text: str, opening: str, closing: str) -> str:
    """Return `text` without white space after each opening mark and before the first closing one that follows it."""
    parts = []
    position = 0
    while (start := text.find(opening, position)) >= 0 and (end := text.find(closing, start + 1)) >= 0:
        parts += [text[position : start + 1], text[start + 1 : end].strip(), closing]
        position = end + 1
    return "".join([*parts, text[position:]])
