"""Lines of JSON-RPC: which ones the SDK can read, and what to answer to the others.

The SDK drops an unreadable line without an answer, so the client that sent a request waits for
ever. It also replaces invalid UTF-8 by U+FFFD, and so would run code that nobody has written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from mcp_types import INVALID_REQUEST, PARSE_ERROR, JSONRPCNotification, jsonrpc_message_adapter
from pydantic import ValidationError

from .._grpc.codec import MAX_MESSAGE_BYTES

MAX_LINE = MAX_MESSAGE_BYTES
"""Bytes of a line: more code than that fits no message to a sandbox."""
TAIL = 4096
"""Bytes at the end of a line that is too long in which an id is looked for."""

_BOM = b"\xef\xbb\xbf"
# A string, punctuation, a number or word, or the quote of a string that does not end.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\],:]|[^\s{}\[\],:"]++|"', re.DOTALL)
_NUMBER = re.compile(rb"-?[0-9]{1,30}(\.[0-9]{1,30})?")
# An id after a long `params`, where the TypeScript SDK puts it.
_LAST_ID = re.compile(
    rb',\s*"id"\s*:\s*(-?[0-9]{1,30}|"[^"\\]*")\s*(?:,\s*"(?:jsonrpc|method)"\s*:\s*"[^"\\]*"\s*)*\}\s*$'
)
_LONGEST_ID = 1024

_NO_REQUEST = (
    'a request is an object with "jsonrpc": "2.0", an "id" that is a string or an integer, a "method" that is'
    ' a string, and "params", if any, that are an object'
)


def check_line(line: bytes) -> tuple[bytes, str, list[bytes]]:
    """Checks a line.

    Returns:
        The line for the SDK, empty if the SDK could not read it; the reason; and the answers, one
        for each request in the line whose id can be read.
    """
    line = line.strip().removeprefix(_BOM)
    if not line:
        return b"", "", []
    try:
        line.decode()
    except UnicodeDecodeError as error:
        byte = line[error.start]
        reason = f"the line is no UTF-8: byte 0x{byte:02x} at position {error.start}"
        return b"", reason, _answers(line, PARSE_ERROR, f"Parse error: {reason}")
    try:
        message = jsonrpc_message_adapter.validate_json(line, by_name=False)
    except ValidationError as error:
        code, reason = _why(line, error)
        kind = "Parse error" if code == PARSE_ERROR else "Invalid request"
        return b"", reason, _answers(line, code, f"{kind}: {reason}")
    if isinstance(message, JSONRPCNotification) and b'"id"' in line:
        # The SDK takes a request whose id is 1.5 for a notification.
        answers = _answers(line, INVALID_REQUEST, f"Invalid request: {_NO_REQUEST}")
        if answers:
            return b"", _NO_REQUEST, answers
    # White space in JSON, but the SDK would end the line there.
    return line.replace(b"\r", b" ") + b"\n", "", []


def answers_to_long_line(head: bytes, tail: bytes) -> tuple[str, list[bytes]]:
    """Why a line of more than `MAX_LINE` bytes is refused, and the answers to it."""
    reason = f"the line is over the limit of {MAX_LINE >> 20} MiB"
    ids = list(_ids(head))
    if not ids and (found := _LAST_ID.search(tail)) and b'"result"' not in head[:TAIL]:
        ids = [found[1]]
    return reason, [_answer(each, INVALID_REQUEST, f"Invalid request: {reason}") for each in ids]


def _why(line: bytes, error: ValidationError) -> tuple[int, str]:
    (first, *_) = error.errors(include_url=False, include_input=False)
    if first["type"] == "json_invalid":
        reason = f"the line is no JSON: {first['ctx']['error']}"
        if "hex escape" in reason or "surrogate" in reason:
            reason += r"; \ud800 to \udfff only make a character in pairs"
        return PARSE_ERROR, reason
    if line.startswith(b"["):
        return INVALID_REQUEST, "batches are not supported: send each message in a line of its own"
    return INVALID_REQUEST, _NO_REQUEST


def _answers(line: bytes, code: int, message: str) -> list[bytes]:
    return [_answer(each, code, message) for each in _ids(line)]


def _answer(request_id: bytes, code: int, message: str) -> bytes:
    error = json.dumps({"code": code, "message": message}).encode()
    return b'{"jsonrpc":"2.0","id":' + request_id + b',"error":' + error + b"}\n"


def _ids(line: bytes) -> Iterator[bytes]:
    """The ids, as JSON, of the requests in a line, which may be broken anywhere, or a batch.

    Ids of answers are left out: the client may have a request of its own with the same id.
    """
    for members in _messages(line):
        value = members.get(b'"id"', b"")
        if b'"result"' in members or b'"error"' in members or len(value) > _LONGEST_ID:
            continue
        if _NUMBER.fullmatch(value):
            yield value
        elif value.startswith(b'"'):
            try:
                yield json.dumps(json.loads(value)).encode()
            except ValueError:  # Bad escapes, or no UTF-8.
                continue


def _messages(line: bytes) -> Iterator[dict[bytes, bytes]]:
    """The members of each message in a line, as far as broken ones can be read.

    Keys and plain values are JSON as it came; other values are empty.
    """
    level = 0  # how deep messages are: 1, or 2 in a batch
    depth = 0
    key = b""
    members: dict[bytes, bytes] = {}
    for match in _TOKEN.finditer(line):
        token = match[0]
        if token == b'"':
            break
        if token in (b"{", b"["):
            level = level or (2 if token == b"[" else 1)
            if depth == level and key:
                members[key] = b""
            depth += 1
        elif token in (b"}", b"]"):
            if depth == level:
                yield members
                members, key = {}, b""
            depth -= 1
        elif depth == level:
            if token == b",":
                key = b""
            elif not key:
                key = token
            elif token != b":":
                members[key] = token
    yield members
