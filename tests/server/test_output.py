"""Text decoded, capped and read by offset."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from prodisco_sandbox.server._output import Output


@given(
    text=st.text(max_size=300),
    cuts=st.lists(st.integers(0, 2000), max_size=8),
    offset=st.integers(0, 400),
)
def test_pieces_of_any_size_give_the_same_text(text: str, cuts: list[int], offset: int) -> None:
    data = text.encode()
    output = Output(1000)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for begin, end in itertools.pairwise(edges):
        output.feed(data[begin:end])
    output.feed(b"", final=True)
    assert output.since() == text
    assert output.since(offset) == text[offset:]
    assert len(output) == len(text)


def test_offsets_find_their_part_in_a_long_text() -> None:
    output = Output(1_000_000)
    text = ""
    for number in range(400):
        piece = f"{number:04d} " * 40
        text += piece
        output.feed(piece.encode())
    for offset in (0, 1, 4095, 4096, 4097, 50_000, len(text) - 1, len(text), len(text) + 5):
        assert output.since(offset) == text[offset:]


def test_the_cut_is_visible_and_final() -> None:
    output = Output(5)
    output.feed("ééé".encode())
    assert output.since() == "ééé"
    output.feed(b"abc")
    assert output.since() == "éééab\n[output cut: more than 5 characters]\n"
    output.feed(b"more", final=True)
    assert output.since().count("cut") == 1


def test_exactly_the_limit_is_not_cut() -> None:
    output = Output(5)
    output.feed(b"12345", final=True)
    assert (output.since(), output.cut) == ("12345", False)


def test_an_incomplete_character_at_the_end_is_replaced() -> None:
    output = Output(10)
    output.feed(b"a\xe2\x82")
    assert output.since() == "a"
    output.feed(b"", final=True)
    assert output.since() == "a\ufffd"
