"""Handles: what names a sandbox, for whom, and what does not."""

from __future__ import annotations

import base64
import hmac
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prodisco_sandbox.mcp._identity import Handles

ALICE, BOB = '["app", null, "alice"]', '["app", null, "bob"]'
SECRET = "correct horse battery staple"


@pytest.mark.parametrize("who", [None, ALICE])
def test_a_handle_is_read_as_the_key_it_was_made_for(who: str | None) -> None:
    handles = Handles(None)
    handle, key = handles.make(who)
    assert handles.read(handle, who) == key
    assert set(handle) <= set(string.ascii_letters + string.digits + "-_"), "it survives being copied"


def test_handles_and_keys_differ_and_do_not_show_each_other() -> None:
    handles = Handles(SECRET)
    made = [handles.make(ALICE) for _ in range(100)]
    assert len({handle for handle, _ in made}) == len({key for _, key in made}) == 100
    for handle, _ in made:
        # 128 random bits, and a tag of 128 bits that they do not give away.
        assert len(base64.urlsafe_b64decode(handle.removeprefix("sbx_") + "=")) == 32


@pytest.mark.parametrize(("maker", "reader"), [(ALICE, BOB), (ALICE, None), (None, ALICE)])
def test_a_handle_is_no_handle_for_anybody_else(maker: str | None, reader: str | None) -> None:
    handles = Handles(SECRET)
    handle, _ = handles.make(maker)
    assert handles.read(handle, reader) is None


def test_a_handle_is_valid_wherever_the_secret_is_the_same_and_only_there() -> None:
    handle, key = Handles(SECRET).make(ALICE)
    assert Handles(SECRET.encode()).read(handle, ALICE) == key
    assert Handles(SECRET + "!").read(handle, ALICE) is None
    assert Handles(None).read(handle, ALICE) is None


@given(position=st.integers(0, 255))
def test_a_handle_with_one_bit_changed_is_none(position: int) -> None:
    handles = Handles(SECRET)
    handle, _ = handles.make(ALICE)
    data = bytearray(base64.urlsafe_b64decode(handle.removeprefix("sbx_") + "="))
    data[position // 8] ^= 1 << position % 8
    forged = "sbx_" + base64.urlsafe_b64encode(data).rstrip(b"=").decode()
    assert handles.read(forged, ALICE) is None


@given(st.text() | st.from_regex(r"sbx_[A-Za-z0-9_=-]*", fullmatch=True))
def test_no_text_is_taken_for_a_handle(text: str) -> None:
    assert Handles(SECRET).read(text, None) is None


@pytest.mark.parametrize("change", [lambda h: h[:-4], lambda h: h + "AAAA", lambda h: h[4:], str.upper])
def test_a_handle_is_read_whole(change: object) -> None:
    handles = Handles(SECRET)
    handle, _ = handles.make(None)
    assert handles.read(change(handle), None) is None  # type: ignore[operator]


def test_tags_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    handles = Handles(SECRET)
    handle, _ = handles.make(ALICE)
    compared: list[tuple[bytes, bytes]] = []

    def compare_digest(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return True

    monkeypatch.setattr(hmac, "compare_digest", compare_digest)
    assert handles.read(handle, BOB) is not None, "the comparison alone decides"
    assert [len(a) for a, _ in compared] == [16]


@pytest.mark.parametrize("secret", ["", "fifteen letters", b"short"])
def test_a_short_secret_is_refused_and_not_repeated(secret: str | bytes) -> None:
    with pytest.raises(ValueError, match="handle_secret is too short: give at least 16") as error:
        Handles(secret)
    assert not secret or str(secret) not in str(error.value)
