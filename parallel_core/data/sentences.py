"""English text into sentences, by rules (no model, no download)."""

from __future__ import annotations

import re

# a run of points is tried from its first one only: from each of n it would take n * n steps
_ENDINGS = re.compile(r"(?<![.!?])[.!?]+[\"'\u2019\u201d)\]]*(\s+)(?=[\"'\u2018\u201c(\[]*[A-Z0-9])")
# fmt: off
_ABBREVIATIONS = frozenset((
    "mr", "mrs", "ms", "dr", "prof", "st", "rev", "hon", "capt", "col", "gen", "lt", "sgt", "sr", "jr", "vs", "etc",
    "e.g", "i.e", "cf", "no", "vol", "pp", "fig", "inc", "ltd", "co", "jan", "feb", "mar", "apr", "jun", "jul", "aug",
    "sep", "sept", "oct", "nov", "dec",
))
# fmt: on


def split_sentences(text: str, keep_newlines: bool = False) -> list[str]:
    """Return the sentences of `text`, without empty ones.

    A sentence ends after `.`, `!` or `?` (and closing quotes or brackets) when white space and a capital or digit
    follow, unless the word before the point is an abbreviation or an initial.

    Args:
        text: English text.
        keep_newlines: Keep the white space after a sentence with it when it holds a line end; otherwise white space
            between sentences is dropped.
    """
    sentences: list[str] = []
    start = searched = 0
    for match in _ENDINGS.finditer(text):
        # the ending before this one was followed by white space, so the last word is not older
        words = text[searched : match.start()].rsplit(None, 1)
        searched = match.end()
        last_word = words[-1].strip("\"'([\u2018\u201c") if words else ""
        is_initial = len(last_word) == 1 and last_word.isupper() and last_word != "I"
        if text[match.start()] == "." and (is_initial or last_word.lower() in _ABBREVIATIONS):
            continue
        keeps_gap = keep_newlines and "\n" in match.group(1)
        sentences.append(text[start : match.end() if keeps_gap else match.start(1)])
        start = match.end()
    sentences.append(text[start:])
    return [sentence for sentence in sentences if sentence.strip()]
