"""ExecuteTest: plain test functions, structured results."""

from __future__ import annotations

from unittest.mock import ANY

import pytest

from prodisco_sandbox.proto import sandbox_pb2 as pb
from prodisco_sandbox.server._options import MAX_TIMEOUT_MS
from prodisco_sandbox.server._service import _records
from tests.support.servers import Stub

CODE = "def add(a, b):\n    return a + b\n\nif __name__ == '__main__':\n    1/0\n"


async def run(
    stub: Stub, tests: str, code: str | None = CODE, timeout_ms: int = MAX_TIMEOUT_MS
) -> pb.ExecuteTestResponse:
    return await stub.ExecuteTest(pb.ExecuteTestRequest(code=code, tests=tests, timeout_ms=timeout_ms))


async def test_results_in_the_order_of_the_file(stub: Stub) -> None:
    tests = """
import unittest, asyncio
def test_z_first(): assert add(1, 2) == 3
def test_a_second():
    print("in the test")
    assert add(1, 2) == 4
async def test_async(): await asyncio.sleep(0)
def test_skipped(): raise unittest.SkipTest("not today")
def helper(): raise RuntimeError
def test_raises():
    {}["key"]
"""
    answer = await run(stub, tests)
    assert [(test.name, test.passed) for test in answer.tests] == [
        ("test_z_first", True),
        ("test_a_second", False),
        ("test_async", True),
        ("test_skipped", False),
        ("test_raises", False),
    ]
    summary = answer.summary
    assert (summary.total, summary.passed, summary.failed, summary.skipped) == (5, 2, 2, 1)
    assert not answer.success
    assert not answer.HasField("error")
    assert answer.output == "in the test\n"
    assert not answer.tests[0].HasField("error")
    # As pytest's rewriting explains it: with the values.
    assert "assert 3 == 4" in answer.tests[1].error
    assert answer.tests[3].error == "not today"
    assert "KeyError: 'key'" in answer.tests[4].error
    assert '{}["key"]' in answer.tests[4].error
    assert "_testing" not in answer.tests[4].error


async def test_all_passing_is_success(stub: Stub) -> None:
    answer = await run(stub, "def test_one():\n    assert True\n", code=None)
    assert answer.success
    assert answer.summary.passed == answer.summary.total == 1
    assert answer.execution_time_ms > 0


async def test_pytest_marks_and_skips(stub: Stub) -> None:
    tests = """
import pytest
@pytest.mark.skip(reason="later")
def test_marked(): assert False
def test_called(): pytest.skip("now")
def test_fixture(tmp_path): pass
def test_raises():
    with pytest.raises(ZeroDivisionError): 1 / 0
"""
    answer = await run(stub, tests)
    assert [test.error for test in answer.tests[:2]] == ["later", "now"]
    # There are no fixtures: plain functions only.
    assert "nothing to pass as tmp_path" in answer.tests[2].error
    assert answer.tests[3].passed
    assert answer.summary.skipped == 2


async def test_what_does_not_come_to_tests_is_an_error(stub: Stub) -> None:
    for tests, code, error in (
        ("def test_x(): pass", "1/0", "ZeroDivisionError: division by zero"),
        ("import nothing_like_it", CODE, "ModuleNotFoundError"),
        ("def test_x(:", CODE, "SyntaxError"),
        ("x = 1", CODE, "no function whose name begins with test_"),
    ):
        answer = await run(stub, tests, code)
        assert not answer.success
        assert error in answer.error
        assert answer.summary.total == 0


@pytest.mark.slow
async def test_tests_before_a_timeout_or_a_crash_count(stub: Stub) -> None:
    tests = "def test_good(): pass\ndef test_stuck():\n    while True: pass\n"
    for timeout_ms in (1000, 4000, 16_000, 60_000):
        answer = await run(stub, tests, timeout_ms=timeout_ms)
        assert answer.error == f"timed out after {timeout_ms} ms"
        assert not answer.success
        if answer.tests:  # Else the time was over before pytest had been imported.
            break
    assert [test.name for test in answer.tests] == ["test_good"]
    answer = await run(
        stub, "def test_good(): pass\ndef test_gone():\n    import os; os.kill(os.getpid(), 9)\n"
    )
    assert [test.name for test in answer.tests] == ["test_good"]
    assert "killed by signal 9" in answer.error


async def test_code_that_writes_into_the_report_is_no_success(stub: Stub) -> None:
    junk = b'[1]\n{"name": 1}\n{"name": "x", "error": null, "outcome": "good"}\njunk\n'
    answer = await run(stub, f"def test_it():\n    import os; os.write(3, {junk!r})\n")
    assert [test.name for test in answer.tests] == ["test_it"]
    assert not answer.success
    assert "disturbed" in answer.error


async def test_a_crash_after_a_failure_is_told(stub: Stub) -> None:
    answer = await run(
        stub, "import os\ndef test_a(): assert 0\ndef test_b(): os.abort()\ndef test_c(): pass"
    )
    assert answer.summary.failed == 1
    assert "SIGABRT" in answer.error


async def test_tests_that_never_ran_are_no_success(stub: Stub) -> None:
    answer = await run(
        stub, "import os\ndef test_a(): pass\ndef test_b(): os._exit(0)\ndef test_c(): assert 0"
    )
    assert not answer.success, answer
    answer = await run(stub, "def test_a(): assert 0", "import os; os._exit(0)")
    assert not answer.success, answer


async def test_long_errors_of_tests_are_cut(stub: Stub) -> None:
    answer = await run(stub, "def test_a(): pass", "raise ValueError('x' * 300_000)")
    assert len(answer.error) < 70_000


async def test_a_long_message_of_a_failed_test(stub: Stub) -> None:
    answer = await run(stub, "def test_a(): raise ValueError('x' * 5_000_000)\ndef test_b(): pass")
    assert [test.name for test in answer.tests] == ["test_a", "test_b"], answer.error[:100]


async def test_a_message_with_a_lone_surrogate(stub: Stub) -> None:
    answer = await run(stub, "def test_a(): raise ValueError('\\ud800')\ndef test_b(): pass")
    assert [test.name for test in answer.tests] == ["test_a", "test_b"], answer.error
    assert not answer.HasField("error")


async def test_a_nested_report(stub: Stub) -> None:
    answer = await run(stub, "def test_a():\n    import os; os.write(3, b'[' * 200_000 + b'\\n')")
    assert "disturbed" in answer.error


def test_junk_in_a_report_is_read_only_so_far() -> None:
    """4 MiB of it took the server's loop for seconds."""
    assert len(_records("1\n" * 1000)) == 100
    test = '{"name": "t", "outcome": "passed", "error": null, "duration_ms": 1}\n'
    assert len(_records(test * 1000)) == 1000
    assert _records(test.replace('"duration_ms": 1', '"duration_ms": null')) == [
        {"error": ANY},
    ]
