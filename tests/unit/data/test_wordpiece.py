"""WordPiece gives the ids of `transformers`' BertTokenizer, frozen here."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel_core.data.tokenizer import build_tokenizer
from parallel_core.data.tokenizer.wordpiece import BertWordPieceTokenizer
from parallel_core.errors import DataError

VOCAB = str(Path(__file__).resolve().parents[2] / "golden" / "squad" / "vocab.txt")
FROZEN = [
    ("The harbour of Vellmark", [211, 151, 185, 220]),
    ("\u00c9lise  Brandt's\tclock\u00a0at 23:40", [270, 443, 255, 387, 393, 11, 61, 135, 122, 111, 30, 113]),
    ("\u65e5\u672c \u6771\u4eactower", [1, 1, 1, 1, 216, 458]),
    ("unbelievablyunknownqqqzzz \u0000\ufffdx\u200by",
     [63, 86, 74, 396, 81, 77, 94, 73, 74, 84, 97, 93, 86, 83, 86, 87, 459, 89, 89, 89, 98, 98, 98, 66, 97]),
    ("a" * 101, [1]),
    ("(about 7 degrees)\u2026\u2014\u201cquoted\u201d",
     [12, 114, 27, 266, 79, 436, 402, 13, 1, 1, 1, 59, 93, 87, 448, 1]),
    ("[MASK] is text? [SEP]", [37, 310, 91, 83, 39, 161, 62, 77, 96, 92, 35, 37, 347, 88, 39]),
    ("Caf\u00e9 na\u00efve STRASSE \u00df \u0130", [258, 78, 77, 56, 73, 81, 94, 77, 61, 92, 90, 73, 445, 77, 1, 51]),
    ("x\u2028y", [66, 67]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "ids"), FROZEN, ids=range(len(FROZEN)))
def test_ids_are_those_of_transformers(text, ids):
    assert build_tokenizer("BertWordPieceLowerCase", vocab_file=VOCAB).tokenize(text) == ids


def test_case_is_kept_where_asked_and_text_comes_back():
    cased = build_tokenizer("BertWordPieceCase", vocab_file=VOCAB)
    assert isinstance(cased, BertWordPieceTokenizer) and cased.tokenize("The of") == [1, 185]
    assert (cased.pad, cased.cls, cased.sep, cased.mask, cased.eod) == (0, 2, 3, 4, 3)
    assert cased.vocab_size == 461 and cased.continues[[443, 255]].tolist() == [True, False]
    assert build_tokenizer("BertWordPieceLowerCase", vocab_file=VOCAB).detokenize([270, 443, 255]) == "elise br"


@pytest.mark.parametrize(
    ("text", "told"), [("[PAD]\n[UNK]\n[CLS]\n[SEP]\n", r"no \[MASK\]"), ("[PAD]\na\na\n", "'a' twice"), ("", "no ")]
)
def test_another_file_is_refused(tmp_path, text, told):
    (tmp_path / "vocab.txt").write_text(text)
    with pytest.raises(DataError, match=told):
        build_tokenizer("BertWordPieceLowerCase", vocab_file=str(tmp_path / "vocab.txt"))
