"""Lines on standard input that are no messages: each is answered where it can be, and ends nothing."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from prodisco_sandbox.mcp._lines import MAX_LINE, answers_to_long_line, check_line
from prodisco_sandbox.mcp._stdio import LineWriter
from tests.support.mcp_server import ERAS, INITIALIZE, META
from tests.support.patience import PATIENCE

HEAD = b'{"jsonrpc":"2.0","id":7,"method":"tools/call","params":'
"""The beginning of a request, which is id 7 in what follows."""

BAD: dict[str, tuple[bytes, int, str]] = {
    "no UTF-8": (HEAD + b'{"code":"\xff"}}', -32700, "no UTF-8: byte 0xff at position 64"),
    "a surrogate in UTF-8": (HEAD + b'{"code":"\xed\xa0\x80"}}', -32700, "no UTF-8"),
    "half a surrogate pair": (HEAD + rb'{"code":"\ud800"}}', -32700, "only make a character in pairs"),
    "broken": (HEAD + b'{"code":', -32700, "the line is no JSON"),
    "broken within a string": (HEAD + b'{"code":"print(1)', -32700, "the line is no JSON"),
    "a comma too many": (HEAD + b"{},}", -32700, "the line is no JSON"),
    "more behind it": (HEAD + b"{}} {}", -32700, "the line is no JSON"),
    "a control character": (HEAD + b'{"code":"a\tb"}}', -32700, "the line is no JSON"),
    "NUL": (b"\0" + HEAD + b"{}}", -32700, "the line is no JSON"),
    "NUL within": (HEAD + b"\0{}}", -32700, "the line is no JSON"),
    "too deep": (HEAD + b"[" * 100_000 + b"]" * 100_000 + b"}", -32700, "recursion limit"),
    "too deep and broken": (HEAD + b'{"a":' * 100_000, -32700, "recursion limit"),
    "a huge number": (HEAD + b"9" * 10_000 + b"}", -32700, "out of range"),
    "a batch": (b"[" + HEAD + b"{}}]", -32600, "batches are not supported"),
    "params that are no object": (HEAD + b"[]}", -32600, 'a request is an object with "jsonrpc"'),
    "no method": (b'{"jsonrpc":"2.0","id":7}', -32600, "a request is an object"),
    "a method that is no string": (b'{"jsonrpc":"2.0","id":7,"method":5}', -32600, "a request is an object"),
    "no version": (b'{"id":7,"method":"tools/list"}', -32600, "a request is an object"),
    "the id last": (b'{"method":"x","params":{"id":1,},"id":7}', -32700, "the line is no JSON"),
}

SILENT: dict[str, bytes] = {
    "garbage": b"hello there",
    "a string": b'"hello"',
    "null": b"null",
    "empty": b"",
    "white space": b" \t \r",
    "an empty batch": b"[]",
    "UTF-16": '{"jsonrpc":"2.0","id":7,"method":"x"}'.encode("utf-16"),
    "a broken answer": b'{"jsonrpc":"2.0","id":7,"result":{',
    "a broken error": b'{"jsonrpc":"2.0","id":7,"error":{"code":',
    "an answer to nothing": b'{"jsonrpc":"2.0","id":7,"result":{}}',
    "an id that is no id": b'{"jsonrpc":"2.0","id":{"id":7},"method":5}',
    "an id of thousands of digits": b'{"jsonrpc":"2.0","id":' + b"7" * 5000 + b',"method":5}',
    "an id within": b'{"jsonrpc":"2.0","method":"x","params":{"id":7,}',
    "a null id": b'{"jsonrpc":"2.0","id":null,"method":"tools/list"}',
    "a cancel of nothing": b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":[7]}}',
}


@pytest.mark.parametrize("name", BAD)
def test_a_request_that_cannot_be_read_is_answered_with_an_error(name: str) -> None:
    line, code, text = BAD[name]
    checked, reason, answers = check_line(line)
    assert checked == b""
    assert text in reason
    assert [json.loads(answer)["id"] for answer in answers] == [7]
    error = json.loads(answers[0])["error"]
    assert error["code"] == code
    assert text in error["message"]
    assert len(error["message"]) < 300
    assert "validation error" not in error["message"]


@pytest.mark.parametrize("name", SILENT)
def test_what_is_no_request_is_not_answered(name: str) -> None:
    assert check_line(SILENT[name])[2] == []


@pytest.mark.parametrize(
    ("shown", "answered"), [("1.5", 1.5), ("-3", -3), ('"a\\u00e9"', "aé"), ('"7"', "7"), ('""', "")]
)
def test_ids_come_back_as_they_were(shown: str, answered: object) -> None:
    _, _, (answer,) = check_line(b'{"jsonrpc":"2.0","id":' + shown.encode() + b',"method":5}')
    assert json.loads(answer)["id"] == answered


def test_each_request_of_a_batch_is_answered() -> None:
    batch = [
        {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {"id": 9}},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "result": {}},
        {"jsonrpc": "2.0", "id": "three", "method": "tools/list"},
    ]
    answers = check_line(json.dumps(batch).encode())[2]
    assert [json.loads(answer)["id"] for answer in answers] == [1, "three"]


def test_a_good_line_is_passed_on_and_is_one_line() -> None:
    good = HEAD + b"{}}"
    assert check_line(good) == (good + b"\n", "", [])
    assert check_line(b"\xef\xbb\xbf" + good + b"\r") == (good + b"\n", "", [])
    assert json.loads(check_line(HEAD + b"\r{}\r}")[0])["id"] == 7
    assert b"\r" not in check_line(HEAD + b"\r{}}")[0]


@pytest.mark.parametrize(
    ("head", "tail"),
    [
        (HEAD + b'{"code":"##', b'##"}}'),
        (b'{"method":"tools/call","params":{"id":1,"code":"##', b'##"},"jsonrpc":"2.0","id":7}'),
        (b'{"params":{"code":"##', b'##"},"id": 7, "method": "tools/call" } '),
    ],
)
def test_a_line_that_is_too_long_is_answered_wherever_its_id_is(head: bytes, tail: bytes) -> None:
    reason, (answer,) = answers_to_long_line(head, tail)
    assert f"{MAX_LINE >> 20} MiB" in reason
    assert json.loads(answer)["id"] == 7


@pytest.mark.parametrize("tail", [b'##","id":7}}', b'##"}', b'{"id":7}]'])
def test_an_id_within_a_long_line_is_not_the_lines(tail: bytes) -> None:
    assert answers_to_long_line(b'{"method":"tools/call","params":{"code":"##', tail)[1] == []


def test_lines_of_two_threads_come_out_whole() -> None:
    read, write = os.pipe()
    writer = LineWriter(write)
    ours, theirs = b"o" * 70_000 + b"\n", b"t" * 70_000 + b"\n"

    def sdk() -> None:
        for _ in range(50):
            for begin in range(0, len(theirs), 30_000):
                writer.write(theirs[begin : begin + 30_000])

    def answers() -> None:
        for _ in range(50):
            writer.write_lines(ours)

    threads = [threading.Thread(target=target) for target in (sdk, answers)]
    lines: list[bytes] = []
    with os.fdopen(read, "rb") as reader:
        for thread in threads:
            thread.start()
        lines.extend(reader.readline() for _ in range(100))
        for thread in threads:
            thread.join()
        os.close(write)
        assert reader.read() == b""
    assert sorted(lines) == [ours] * 50 + [theirs] * 50


# The program

SHORT_LINES = """
import sys
from prodisco_sandbox.mcp import __main__ as program, _stdio
_stdio.MAX_LINE = 2_000_000
sys.exit(program.main(["--local"]))
"""


class Talk:
    """The program on stdio, spoken to in lines."""

    def __init__(self, process: asyncio.subprocess.Process, era: str) -> None:
        self._process, self._era = process, era
        self._number = 100

    def send(self, line: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + b"\n")

    def request(self, method: str, params: dict[str, Any]) -> int:
        self._number += 1
        if self._era != "legacy":
            params = {**params, "_meta": META}
        message = {"jsonrpc": "2.0", "id": self._number, "method": method, "params": params}
        self.send(json.dumps(message).encode())
        return self._number

    async def answers(self, method: str, params: dict[str, Any]) -> list[dict[str, Any]]:
        """Sends a request, and returns all that comes up to its answer."""
        number, heard = self.request(method, params), []
        assert self._process.stdout is not None
        async with asyncio.timeout(4 * PATIENCE):  # The first answer waits for the program's start.
            while True:
                heard.append(json.loads(await self._process.stdout.readline()))
                if heard[-1].get("id") == number:
                    return heard


@asynccontextmanager
async def talk(era: str) -> AsyncIterator[Talk]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SHORT_LINES),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 20,
    )
    try:
        yield Talk(process, era)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        async with asyncio.timeout(PATIENCE):
            assert await process.stdout.read() == b""
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("era", [pytest.param(ERAS[0], marks=pytest.mark.slow), ERAS[1]])
async def test_no_line_ends_or_stalls_the_program(era: str) -> None:
    async with talk(era) as program:
        program.send(BAD["broken"][0])  # Not the request that decides which protocol it is.
        if era == "legacy":
            heard = await program.answers("initialize", INITIALIZE)
            program.send(b'{"jsonrpc":"2.0","method":"notifications/initialized"}')
        else:
            heard = await program.answers("tools/list", {})
        assert [message.get("error", {}).get("code") for message in heard] == [-32700, None]
        for name, (line, code, text) in BAD.items():
            program.send(line)
            answer, result = await program.answers("tools/list", {})
            assert (answer["id"], answer["error"]["code"]) == (7, code), name
            assert text in answer["error"]["message"]
            assert result["result"]["tools"]
        for name, line in SILENT.items():
            program.send(line)
            (result,) = await program.answers("tools/list", {})
            assert result["result"]["tools"], name
        program.send(HEAD + b'{"code":"' + b"#" * 3_000_000 + b'"}}')
        answer, result = await program.answers("tools/list", {})
        assert (answer["id"], answer["error"]["code"]) == (7, -32600)
        call: dict[str, Any]
        for arguments in ("print(1)", ["print(1)"], 5, True):
            call = {"name": "run_sandbox", "arguments": arguments}
            (result,) = await program.answers("tools/call", call)
            assert "they must be an object" in result["result"]["content"][0]["text"]
            assert result["result"]["isError"]
        for lacking in (None, {"script": "print(1)"}):
            (result,) = await program.answers("tools/call", {"name": "run_sandbox", "arguments": lacking})
            assert "needs `code`" in result["result"]["content"][0]["text"]
        call = {"name": "run_sandbox", "arguments": '{"code": "print(6 * 7)", "\\ud800": 1}'}
        (result,) = await program.answers("tools/call", call)
        assert result["result"]["structuredContent"]["output"] == "42\n"


async def test_a_last_line_without_an_end_is_read_and_prints_are_no_messages() -> None:
    # The package itself would load the SDK, which takes seconds.
    code = """
import importlib.util, os, sys
package = importlib.util.find_spec("prodisco_sandbox.mcp")
sys.modules[package.name] = importlib.util.module_from_spec(package)
from prodisco_sandbox.mcp import _stdio
stdio = _stdio.Stdio()
stdio.install()
print("a stray word")
os.write(1, b"another\\n")
os.system("cat; echo a child")
sys.stdout.buffer.write(sys.stdin.buffer.read())
"""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    good = HEAD + b"{}}"
    out, err = await asyncio.wait_for(process.communicate(b"nonsense\n" + good), PATIENCE)
    assert out == good + b"\n"
    assert err.splitlines()[:3] == [b"a stray word", b"another", b"a child"]
