"""Who is ended for whom, as a table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prodisco_sandbox._sessions.eviction import Holder, choose

EVICT_AFTER, LONG = 30.0, 300.0


def chosen(text: str, caller: str | None) -> str | None:
    """The place of the session chosen of some that hold all slots.

    "A 40+, - 99, B x" are one of owner A, idle for 40 seconds and returned to, one of nobody known,
    never returned to, and one of B that is in use.
    """
    holders = []
    for place, word in enumerate(text.split(",") if text else []):
        owner, idle = word.split()
        seconds = None if idle == "x" else float(idle.rstrip("+"))
        holders.append(Holder(str(place), None if owner == "-" else owner, seconds, idle.endswith("+")))
    found = choose(holders, caller, slots=len(holders), evict_after=EVICT_AFTER, long_idle=LONG)
    return None if found is None else found.name


@pytest.mark.parametrize(
    ("holders", "caller", "expected"),
    [
        pytest.param("", "A", None, id="nobody"),
        pytest.param("A x, B x, - x", "A", None, id="all in use"),
        pytest.param("A 29.9, - 29.9", "A", None, id="used a moment ago"),
        pytest.param("A 30, - 500", "A", "0", id="the caller's own first"),
        pytest.param("A 200+, A 40, A 90", "A", "2", id="of the own never returned to, then longest idle"),
        pytest.param("A 40+, A 90+, B 600", "A", "1", id="of the own returned to, longest idle"),
        pytest.param("A x, B 40+, B 99+, B 50+, C x, C 600", "A", "2", id="of the owner with most"),
        pytest.param("A x, B x, B x, B x, C 50+, C x, - 600", "A", "6", id="the most keep their share"),
        pytest.param("- 40, - 50, - 299+", None, "1", id="unknown owners: never returned to"),
        pytest.param("- 299+, - 40+, - x", None, None, id="unknown owners: returned to"),
        pytest.param("- 299+, - 300+, - 301+", None, "2", id="unknown owners: left for long"),
        pytest.param("- 40, - 900+", None, "0", id="never returned to before left for long"),
        pytest.param(", ".join(["A 200+"] * 9 + ["- x"]), None, None, id="an unknown caller has no claim"),
        pytest.param(", ".join(["A 40"] * 9 + ["- x"]), None, "0", id="an unknown caller takes the unused"),
        pytest.param(", ".join(["A 200+"] * 10), "B", "0", id="one owner has all"),
        pytest.param(", ".join(["A 200"] * 5 + ["B x"] * 5), "B", None, id="an owner keeps its share"),
        pytest.param(", ".join(["A 900+"] * 5 + ["B x"] * 5), "B", None, id="however long it is idle"),
        pytest.param(", ".join(["A 200+"] * 6 + ["B x"] * 4), "B", "0", id="an owner has more than that"),
        pytest.param(", ".join(["A 99+"] * 4 + ["B x"] * 3 + ["C x"] * 3), "C", None, id="no turns"),
        pytest.param(", ".join(["A 99"] * 4 + ["B x"] * 3 + ["C x"] * 3), "C", "0", id="but of the unused"),
        pytest.param(", ".join(f"{c} 99+" for c in "ABCDEFGHIJ"), "K", None, id="eleven owners in turn"),
        pytest.param(", ".join(f"{c} 99" for c in "ABCDEFGHIJ"), "K", "0", id="more owners than slots"),
        pytest.param(", ".join(f"{c} 300+" for c in "ABCDEFGHIJ"), "K", "0", id="more owners, one left"),
        pytest.param(", ".join(f"{c} 99" for c in "ABCDEFGHI") + ", J x", "J", None, id="as many owners"),
        pytest.param("A 40+, A 40+, B 99+, B 99+, B 99+, C x, C x, C x, C x, C x", "D", "2", id="in use"),
    ],
)  # fmt: skip
def test_the_choice(holders: str, caller: str | None, expected: str | None) -> None:
    assert chosen(holders, caller) == expected


OWNERS = st.sampled_from(["A", "B", "C", None])
HOLDERS = st.lists(
    st.tuples(OWNERS, st.none() | st.sampled_from([0.0, 29.0, 30.0, 200.0, 300.0, 900.0]), st.booleans()),
    max_size=8,
)


@given(HOLDERS, OWNERS)
def test_what_no_choice_may_do(
    drawn: list[tuple[str | None, float | None, bool]], caller: str | None
) -> None:
    holders = [Holder(str(i), *each) for i, each in enumerate(drawn)]
    found = choose(holders, caller, slots=8, evict_after=EVICT_AFTER, long_idle=LONG)
    if found is None:
        assert not any(h.owner is None and not h.returned and (h.idle or 0) >= 30 for h in holders)
        assert caller is None or not any(h.owner == caller and (h.idle or 0) >= 30 for h in holders)
        return
    assert found.idle is not None, "it is in use"
    assert found.idle >= EVICT_AFTER
    if found.owner is None or caller is None:
        assert not found.returned or found.idle >= LONG
    if found.owner is not None and found.owner != caller:
        owners = {caller} | {holder.owner for holder in holders}
        assert sum(holder.owner == found.owner for holder in holders) > 8 // len(owners)
