"""Text that comes token by token: whole characters, no stop text, and in the end the very text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_core.generate.text import TextStream


def of_bytes(tokens) -> str:
    """A tokenizer whose tokens are bytes, the hardest case."""
    return bytes(tokens).decode("utf-8", errors="replace")


@settings(deadline=None)
@given(st.text(max_size=30))
def test_pieces_are_whole_characters_and_make_the_text(text: str) -> None:
    stream, shown = TextStream(of_bytes), ""
    for token in text.encode():
        stream.add(token)
        assert text.startswith(stream.text) and stream.text.startswith(shown) and stream.certain == len(stream.text)
        shown = stream.text
    stream.end()
    assert stream.text == text


@settings(deadline=None)
@given(st.text("abc\n", max_size=40), st.lists(st.text("abc\n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_of_a_stop_text_is_shown(text: str, stops: list[str]) -> None:
    stream, shown = TextStream(of_bytes, stops), ""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    for token in text.encode():
        stream.add(token)
        assert stream.text.startswith(shown)
        shown = stream.text[: stream.certain]
        assert not any(stop in shown for stop in stops)
        if stream.stopped:
            break
    stream.end()
    assert stream.text.startswith(shown)
    shown = stream.text
    assert stream.stopped == bool(places)
    if not places:
        assert shown == text
    else:
        # Where texts overlap, the one that is complete first ends the answer.
        ends = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        starts = min(text.find(stop) for stop in stops if stop in text[:ends])
        assert shown == text[:starts]


def test_bytes_that_never_make_a_character_are_shown_in_the_end() -> None:
    stream = TextStream(of_bytes)
    for token in "é".encode()[:1]:
        stream.add(token)
    assert stream.text == ""
    stream.end()
    assert stream.text == "\ufffd"


def test_words_of_tokens_that_carry_a_space_are_joined_as_the_tokenizer_joins_them() -> None:
    """SentencePiece drops the space before the first token of what it is given."""
    pieces = ["▁Once", "▁up", "on", "▁a"]
    stream = TextStream(lambda ids: "".join(pieces[i] for i in ids).replace("▁", " ").removeprefix(" "))
    shown = []
    for token in range(4):
        stream.add(token)
        shown.append(stream.text)
    assert shown == ["Once", "Once up", "Once upon", "Once upon a"]
