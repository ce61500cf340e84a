"""What the SDK does for each server and each client, done once; what the program sets, undone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from mcp.server.mcpserver.tools import base
from mcp.server.mcpserver.utilities.func_metadata import func_metadata


@pytest.fixture(scope="session", autouse=True)
def _models_and_schemas() -> Iterator[None]:
    """The models of a tool's arguments, and the check of its schema: most of the time of short tests."""
    made: dict[Any, Any] = {}
    checked: set[str] = set()
    check = Draft202012Validator.check_schema

    def make_once(
        func: Callable[..., Any], skip_names: Sequence[str] = (), structured_output: bool | None = None
    ) -> Any:
        key = (getattr(func, "__func__", func), tuple(skip_names), structured_output)
        if key not in made:
            made[key] = func_metadata(func, skip_names, structured_output)
        return made[key]

    def check_once(schema: Any) -> None:
        text = json.dumps(schema, sort_keys=True)
        if text not in checked:
            check(schema)
            checked.add(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "func_metadata", make_once)
        patch.setattr(Draft202012Validator, "check_schema", check_once)
        yield


@pytest.fixture(autouse=True)
def _levels() -> Iterator[None]:
    """What the program sets for itself is not for the tests after it."""
    loggers = [
        logging.getLogger(name)
        for name in ("prodisco_sandbox", "mcp.server.streamable_http", "mcp.server.streamable_http_manager")
    ]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)
