"""Runs plain ``test_*`` functions, in the process that is to run the code.

Standard library only, and pytest where the interpreter has it: its assertion rewriting
makes ``assert a == b`` say what a and b were.
"""

from __future__ import annotations

import os
import resource
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType
    from typing import Any

_CODE, _TESTS = "<code>", "<tests>"
_ROOM = 8 << 20
_ERROR = 65_536
"""Characters of an error text, so that one long text does not use up the report."""


def run(code: str, tests: str, report: int) -> int:
    """Runs the tests in the namespace that the code has made.

    Writes a line of JSON to `report` for every test as it ends, so that those before a
    crash or a timeout are not lost: name, outcome (passed, failed or skipped), error,
    duration_ms; or error alone, if no test could run. The last line says that all tests
    were run.

    Returns:
        The exit status: 0 where all tests passed or were skipped.
    """
    import json
    import linecache
    import traceback

    def tell(error: str | None, **record: object) -> None:
        record["error"] = error and _bounded(error)
        data = json.dumps(record).encode() + b"\n"
        while data:
            data = data[os.write(report, data) :]

    for name, text in ((_CODE, code), (_TESTS, tests)):
        # Without a time of change, linecache keeps lines that are in no file.
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    module = sys.modules["sandbox"] = type(sys)("sandbox")
    sys.argv[:] = [_TESTS]
    try:
        exec(compile(code, _CODE, "exec", dont_inherit=True), module.__dict__)  # noqa: S102
        before = dict(module.__dict__)
        exec(_rewritten(tests), module.__dict__)  # noqa: S102
    except BaseException as error:  # noqa: BLE001
        make_room(error)
        traceback.print_exception(_trimmed(error))
        tell(error="".join(traceback.format_exception_only(error)).strip())
        return 1
    found = {
        name: value
        for name, value in module.__dict__.items()
        if name.startswith("test_") and callable(value) and before.get(name) is not value
    }
    if not found:
        tell(error="the tests hold no function whose name begins with test_")
        return 1
    failed = 0
    for name, function in found.items():
        outcome, error_text, duration = _call(function)
        failed += outcome == "failed"
        tell(name=name, outcome=outcome, error=error_text, duration_ms=round(duration * 1000))
    tell(None, done=True)
    return 1 if failed else 0


def make_room(error: BaseException) -> None:
    """Raises the memory limit, so that a MemoryError can be reported.

    The server's memory watch leaves this much between the limit and killing the process.
    """
    if isinstance(error, MemoryError):
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if soft != resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_DATA, (min(soft + _ROOM, hard), hard))


def _bounded(text: str) -> str:
    """The text as it can be reported: bounded, and without lone surrogates."""
    if len(text) > _ERROR:
        note = f"\n[cut: {len(text):,} characters]"
        text = text[: _ERROR - len(note)] + note
    return text.encode("utf-8", "backslashreplace").decode()


def _rewritten(tests: str) -> CodeType:
    import ast

    tree = ast.parse(tests, _TESTS)
    try:
        from _pytest.assertion.rewrite import rewrite_asserts
    except ImportError:
        _explain_asserts(tree, tests)
    else:
        rewrite_asserts(tree, tests.encode())
    return compile(tree, _TESTS, "exec", dont_inherit=True)


def _explain_asserts(tree: Any, tests: str) -> None:
    """Gives every assert without a message its own source text as message."""
    import ast

    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and node.msg is None:
            text = ast.get_source_segment(tests, node.test) or ""
            node.msg = ast.copy_location(ast.Constant(f"assert {text}"), node.test)


def _call(function: Callable[[], Any]) -> tuple[str, str | None, float]:
    """Outcome, error text and seconds of one test."""
    import asyncio
    import inspect
    import time
    import traceback

    began = time.perf_counter()
    outcome, text = "passed", None
    try:
        if needed := _needed(function):
            raise TypeError(f"plain functions only: there is nothing to pass as {needed}")
        reason = _marked_to_skip(function)
        if reason is not None:
            outcome, text = "skipped", reason
        elif inspect.iscoroutinefunction(function):
            asyncio.run(function())
        else:
            function()
    except BaseException as error:  # noqa: BLE001
        make_room(error)
        # unittest's and pytest's skips; pytest's is a BaseException.
        if type(error).__name__ in ("SkipTest", "Skipped"):
            outcome, text = "skipped", str(error)
        else:
            outcome, text = "failed", "".join(traceback.format_exception(_trimmed(error))).strip()
    return outcome, text, time.perf_counter() - began


def _needed(function: Callable[[], Any]) -> str:
    import inspect

    parameters = inspect.signature(function).parameters.values()
    return ", ".join(
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    )


def _marked_to_skip(function: Callable[[], Any]) -> str | None:
    for mark in getattr(function, "pytestmark", ()):
        if mark.name == "skip":
            return str(mark.kwargs.get("reason") or (mark.args[0] if mark.args else "marked to be skipped"))
    return None


def _trimmed(error: BaseException) -> BaseException:
    """The error without the frames of this file."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename not in (_CODE, _TESTS):
        frames = frames.tb_next
    return error.with_traceback(frames)
