"""The tool's result, and how long output is cut."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

from mcp_types import CallToolResult, ContentBlock, TextContent
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, WithJsonSchema

from ..results import CacheEntry, ExecutionInfo, ExecutionOutcome, TestReport
from ._environment import MARK

MOST_ERROR = 8_000
"""Characters of an error's text that are returned."""
MOST_TESTS = 200
"""How many tests are reported one by one."""
MOST_NAME = 200
"""Characters of a test's name that are returned."""


def _shorten(schema: dict[str, Any]) -> None:
    """Fields without a value are left out, never null."""
    for field in schema["properties"].values():
        for kind in field.pop("anyOf", ()):
            if kind != {"type": "null"}:
                field.update(kind)
        field.pop("default", None)
        field.pop("title", None)


class _Output(BaseModel):
    model_config = ConfigDict(json_schema_extra=_shorten)


class CachedScript(_Output):
    name: str = Field(description="What `cached` takes")
    description: str | None = None


class Execution(_Output):
    execution_id: str
    state: str
    started_at_ms: int = Field(description="Since the Unix epoch")
    finished_at_ms: int | None = None
    code_preview: str
    cached_name: str | None = None


class Test(_Output):
    name: str
    passed: bool
    error: str | None = None
    duration_ms: int


class Summary(_Output):
    total: int
    passed: int
    failed: int
    skipped: int


class NamedFile(_Output):
    path: str
    size: int | None = Field(default=None, description="In bytes")
    kind: str | None = Field(default=None, description="directory, or other (neither that nor a file)")
    uri: str | None = Field(default=None, description="Of the resource with its content")


def _flat(kind: type[BaseModel], *, many: bool = False) -> WithJsonSchema:
    """The schema of a nested object in place: not every client follows a reference."""
    schema = kind.model_json_schema()
    return WithJsonSchema({"type": "array", "items": schema} if many else schema)


class _Result(_Output):
    """What results of all tools have."""

    sandbox: Annotated[str | None, Field(description="Handle: pass it as `sandbox` to come back here")] = None
    note: Annotated[str | None, Field(description="Read this first")] = None
    _blocks: list[ContentBlock] = PrivateAttr(default_factory=list)

    @property
    def blocks(self) -> list[ContentBlock]:
        """What is attached to the result, such as the pictures that a run made."""
        return self._blocks

    def add_note(self, note: str) -> None:
        self.note = note if self.note is None else f"{self.note}\n\n{note}"


class FileOutput(_Result):
    """The result of a call on files; fields without a value are left out."""

    path: str | None = None
    size: Annotated[int | None, Field(description="In bytes")] = None
    text: Annotated[str | None, Field(description="The content, if it is text")] = None
    truncated: Annotated[bool | None, Field(description="Whether there is more")] = None
    files: Annotated[list[NamedFile] | None, _flat(NamedFile, many=True), Field(description="By path")] = None


class SandboxOutput(_Result):
    """The result of a call; fields without a value are left out."""

    success: Annotated[
        bool | None, Field(description="Whether the code, the tests or the cancel succeeded")
    ] = None
    state: Annotated[
        str | None,
        Field(
            description="PENDING, RUNNING, COMPLETED, FAILED, CANCELLED or TIMEOUT; the last four are final"
        ),
    ] = None
    execution_id: Annotated[str | None, Field(description="For the modes status and cancel")] = None
    output: Annotated[
        str | None, Field(description="Standard output; in mode execute with standard error in it")
    ] = None
    error_output: Annotated[str | None, Field(description="Standard error")] = None
    error: Annotated[str | None, Field(description="Why it failed")] = None
    truncated: Annotated[
        bool | None, Field(description="Whether there is more output; `note` says how to get it")
    ] = None
    output_offset: Annotated[int | None, Field(description="Where further output begins")] = None
    error_output_offset: Annotated[int | None, Field(description="Where further error output begins")] = None
    execution_time_ms: int | None = None
    cached: Annotated[
        CachedScript | None,
        _flat(CachedScript),
        Field(description="The script was added to the sandbox's cache"),
    ] = None
    executions: Annotated[
        list[Execution] | None, _flat(Execution, many=True), Field(description="Newest first")
    ] = None
    summary: Annotated[Summary | None, _flat(Summary)] = None
    tests: Annotated[list[Test] | None, _flat(Test, many=True)] = None
    files: Annotated[
        list[NamedFile] | None,
        _flat(NamedFile, many=True),
        Field(description="What this run made or changed in the working directory"),
    ] = None

    def end(self, outcome: ExecutionOutcome) -> None:
        """Takes over how an execution ended."""
        self.success = outcome.success
        if outcome.state:
            self.state = outcome.state.name
        self.error = None if outcome.error is None else shorten(outcome.error)
        self.execution_time_ms = outcome.execution_time_ms
        self.cached = read_cached(outcome.cached)


def result_of(output: _Result, problem: str | None = None) -> CallToolResult:
    """The result of a call; `problem` is the text of an error."""
    data = output.model_dump(mode="json", exclude_none=True)
    texts = [] if problem is None else [problem]
    if data:
        # For clients that do not look at structured content.
        texts.append(json.dumps(data, ensure_ascii=False))
    if problem is not None:  # For clients that look at nothing else.
        data["note"] = "\n\n".join(filter(None, (problem, data.get("note"))))
    return CallToolResult(
        content=[*(TextContent(type="text", text=text) for text in texts), *output.blocks],
        structured_content=data or None,
        is_error=problem is not None,
    )


class Clip:
    """The beginning of an output that comes in pieces; the rest is only counted."""

    def __init__(self, limit: int) -> None:
        self._room = limit
        self._kept: list[str] = []
        self.total = 0

    def add(self, text: str) -> int:
        """Adds a piece; returns how many characters of it are kept."""
        self.total += len(text)
        if len(text) > self._room:
            text = text[: self._room]
        if text:
            self._kept.append(text)
            self._room -= len(text)
        return len(text)

    @property
    def text(self) -> str:
        return "".join(self._kept)

    @property
    def left_out(self) -> int:
        return self.total - sum(map(len, self._kept))


def shorten(text: str, most: int = MOST_ERROR) -> str:
    """Cuts out the middle of a text: an error's beginning and its end say most."""
    if len(text) <= most:
        return text
    head = most // 4
    return f"{text[:head]}\n[... {len(text) - most:,} characters left out ...]\n{text[head - most :]}"


def read_cached(entry: CacheEntry | None) -> CachedScript | None:
    return None if entry is None else CachedScript(name=entry.name, description=entry.description or None)


def read_executions(found: Iterable[ExecutionInfo], limit: int) -> list[Execution]:
    """The newest executions, whatever order the server has."""
    asked = (info for info in found if not info.code_preview.startswith(MARK))
    newest = sorted(asked, key=lambda info: info.started_at_ms, reverse=True)[:limit]
    return [
        Execution(
            execution_id=info.execution_id,
            state=info.state.name,
            started_at_ms=info.started_at_ms,
            finished_at_ms=info.finished_at_ms,
            code_preview=info.code_preview,
            cached_name=info.cached_name,
        )
        for info in newest
    ]


def read_report(report: TestReport, most_output: int, less: str) -> SandboxOutput:
    summary = report.summary
    clip = Clip(most_output)
    clip.add(report.output)
    # Failed tests first, where there are too many.
    shown = sorted(report.tests, key=lambda test: test.passed)[:MOST_TESTS]
    tests: list[Test] = []
    room, silent = most_output, 0
    for test in shown:
        error = None if test.error is None else shorten(test.error, MOST_ERROR // 4)
        room -= len(error or "")
        if error and room < 0 and tests:  # The first error is always told.
            error, silent = None, silent + 1
        tests.append(
            Test(
                name=shorten(test.name, MOST_NAME),
                passed=test.passed,
                error=error,
                duration_ms=test.duration_ms,
            )
        )
    result = SandboxOutput(
        success=report.success,
        output=clip.text,
        error=None if report.error is None else shorten(report.error),
        execution_time_ms=report.execution_time_ms,
        summary=Summary(
            total=summary.total, passed=summary.passed, failed=summary.failed, skipped=summary.skipped
        ),
        tests=tests,
    )
    if len(shown) < len(report.tests):
        result.add_note(
            f"Only {len(shown)} of {len(report.tests):,} tests are shown, those that failed first."
        )
    if silent:
        result.add_note(
            f"The errors of {silent} more tests are left out: fix what is shown, or run fewer tests."
        )
    if clip.left_out:
        result.truncated = True
        result.add_note(
            f"The output is cut: {clip.left_out:,} more characters are lost. Run fewer tests, {less}."
        )
    return result
