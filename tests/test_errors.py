from __future__ import annotations

import copy
import inspect
import pickle
import traceback

import pytest

import prodisco_sandbox
from prodisco_sandbox import SandboxError, SandboxFailedError, SandboxTimeoutError, errors

ERRORS = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, Exception)]


def test_the_tree_is_the_one_in_its_docstring() -> None:
    assert inspect.getdoc(SandboxError) is not None
    drawn = [line.split()[1] for line in inspect.getdoc(SandboxError).splitlines() if "──" in line]  # type: ignore[union-attr]
    assert drawn == [kind.__name__ for kind in ERRORS if kind is not SandboxError]
    bases = {kind: kind.__bases__ for kind in ERRORS if kind is not SandboxError}
    assert bases.pop(SandboxTimeoutError) == (SandboxError, TimeoutError)
    assert all(base == (SandboxError,) for base in bases.values())
    assert SandboxError.__bases__ == (Exception,)
    assert {kind.__name__ for kind in ERRORS} == {n for n in prodisco_sandbox.__all__ if n.endswith("Error")}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("status", [None, 409, "NOT_FOUND"])
def test_an_error_survives_copy_and_pickle(kind: type[SandboxError], status: int | str | None) -> None:
    error = kind("no slot for session 5e", status=status)
    error.add_note("try again later")
    for same in (copy.copy(error), pickle.loads(pickle.dumps(error)), error.copy_for_waiter()):
        assert type(same) is kind
        assert same is not error
        assert str(same) == "no slot for session 5e"
        assert same.args == error.args
        assert same.status == status
        assert same.__notes__ == [page_of(kind), "try again later"]
        same.add_note("in five minutes")
    assert error.__notes__ == [page_of(kind), "try again later"]


def page_of(kind: type[SandboxError]) -> str:
    return f"What to do: docs/troubleshooting.md#{kind.__name__.lower()} of prodisco-sandbox"


@pytest.mark.parametrize("kind", ERRORS)
def test_the_traceback_of_an_error_names_its_page(kind: type[SandboxError]) -> None:
    error = kind("no slot")
    assert "".join(traceback.format_exception(error)).endswith(f"{kind.__name__}: no slot\n{page_of(kind)}\n")
    assert str(error) == "no slot"


def test_the_page_of_a_subclass_is_that_of_the_public_class() -> None:
    assert Own("gone").__notes__ == [page_of(SandboxFailedError)]


def test_status_is_none_unless_something_was_said() -> None:
    assert SandboxError("unreachable").status is None
    with pytest.raises(TypeError):
        SandboxError("unreachable", 503)  # type: ignore[call-arg]


def test_a_subclass_with_a_field_of_its_own_survives_too() -> None:
    copied = Own("gone", status=404).copy_for_waiter()
    assert (copied.verb, copied.status) == ("get", 404)


class Own(SandboxFailedError):
    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message, status=status)
        self.verb = "get"


def test_a_copy_for_a_waiter_has_the_cause_and_a_traceback_of_its_own() -> None:
    cause = OSError("connection refused")
    try:
        raise SandboxTimeoutError("not ready in 120 s") from cause
    except SandboxTimeoutError as e:
        error = e

    def waiter() -> None:
        raise error.copy_for_waiter()

    copies = []
    for _ in range(2):
        with pytest.raises(SandboxTimeoutError) as caught:
            waiter()
        copies.append(caught.value)
    one, other = copies
    assert one is not other
    assert one.__cause__ is other.__cause__ is cause
    assert one.__suppress_context__
    depth = len(traceback.extract_tb(one.__traceback__))
    assert depth == len(traceback.extract_tb(other.__traceback__)) == 2
    assert len(traceback.extract_tb(error.__traceback__)) == 1
