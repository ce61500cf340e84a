"""The tools' schemas are such that every provider's function calling takes them.

The rules are those that OpenAI publishes for strict mode (platform.openai.com/docs/guides/structured-outputs,
"Supported schemas"), and Google for the Schema of function declarations (ai.google.dev/api/caching#Schema):
what each names as supported, in the part that all models of each have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from mcp import Client
from mcp_types import Tool

from tests.support.mcp_server import rig

Schema = dict[str, Any]

MOST_PROPERTIES, MOST_LEVELS, MOST_ENUM = 100, 5, 500
"""The lowest limits that OpenAI ever had."""
MOST_CHARACTERS = 6_000
"""Of a tool's input schema: it is in every request."""


@pytest.fixture
async def tools() -> list[Tool]:
    async with rig() as r, Client(r.server) as client:
        return (await client.list_tools()).tools


def every(schema: Schema) -> Iterator[Schema]:
    """The schema, and all in it."""
    yield schema
    for below in (*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else ())):
        yield from every(below)


def levels(schema: Schema) -> int:
    below = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else ())]
    return 1 + max(map(levels, below), default=0)


ANNOTATIONS = {"title", "description"}
OPENAI = {
    "string": {"enum", "pattern", "format"},
    "integer": {"enum", "multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "boolean": set[str](),
    "array": {"items", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}


def to_openai(schema: Schema) -> Schema:
    """The schema for strict mode: nothing else is allowed, all is required, and what was not may be null."""
    kind = schema["type"]
    unknown = set(schema) - OPENAI[kind] - ANNOTATIONS - {"type"}
    assert not unknown, f"strict mode does not know {unknown}"
    converted = dict(schema)
    if kind == "array":
        converted["items"] = to_openai(schema["items"])
    if kind == "object":
        required = schema.get("required", [])
        converted["properties"] = {
            name: to_openai(below) if name in required else nullable(to_openai(below))
            for name, below in schema["properties"].items()
        }
        converted["required"] = list(schema["properties"])
        converted["additionalProperties"] = False
    return converted


def nullable(schema: Schema) -> Schema:
    choices = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
    return {**schema, "type": [schema["type"], "null"], **choices}


GEMINI = ANNOTATIONS | {
    *("type", "format", "nullable", "enum", "items", "minItems", "maxItems", "properties", "required"),
    *("minimum", "maximum", "example", "propertyOrdering"),
}


def to_gemini(schema: Schema) -> Schema:
    """The schema as a Schema of a function declaration."""
    unknown = set(schema) - GEMINI
    assert not unknown, f"Gemini does not know {unknown}"
    converted = {**schema, "type": schema["type"].upper()}
    if "enum" in schema:
        assert schema["type"] == "string"
        assert all(isinstance(value, str) and value for value in schema["enum"])
        converted["format"] = "enum"
    if schema["type"] == "array":
        converted["items"] = to_gemini(schema["items"])
    if schema["type"] == "object":
        assert schema["properties"]
        assert set(schema.get("required", ())) <= set(schema["properties"])
        converted["properties"] = {name: to_gemini(below) for name, below in schema["properties"].items()}
    return converted


async def test_schemas_are_small_and_flat(tools: list[Tool]) -> None:
    assert len(tools) == 4
    for tool in tools:
        assert len(json.dumps(tool.input_schema)) < MOST_CHARACTERS, tool.name
        assert all("properties" not in below for below in tool.input_schema["properties"].values())
        assert tool.output_schema is not None
        for schema in (tool.input_schema, tool.output_schema):
            text = json.dumps(schema)
            for word in ("anyOf", "oneOf", "allOf", "$ref", "$defs", '"null"'):
                assert word not in text, (tool.name, word)


async def test_openais_strict_mode_takes_them(tools: list[Tool]) -> None:
    for tool in tools:
        strict = to_openai(tool.input_schema)
        assert strict["type"] == "object"
        found = list(every(strict))
        assert sum(len(each.get("properties", ())) for each in found) <= MOST_PROPERTIES
        assert sum(len(each.get("enum", ())) for each in found) <= MOST_ENUM
        assert levels(strict) <= MOST_LEVELS
        for each in found:
            if each["type"] == "object":
                assert each["additionalProperties"] is False
                assert set(each["required"]) == set(each["properties"])
        assert len(tool.name) <= 64


async def test_geminis_function_declarations_take_them(tools: list[Tool]) -> None:
    for tool in tools:
        declaration = to_gemini(tool.input_schema)
        assert declaration["type"] == "OBJECT"
        assert all(each["type"].isupper() for each in every(declaration))


async def test_what_strict_mode_sends_for_unused_parameters_is_taken_for_nothing() -> None:
    """All parameters are there in strict mode, and null where the model does not use them."""
    async with rig(sandbox_options={"files": True}) as r, Client(r.server) as client:
        for tool in (await client.list_tools()).tools:
            sent: dict[str, Any] = dict.fromkeys(tool.input_schema["properties"])
            if tool.name == "run_sandbox":
                sent |= {"mode": "execute", "code": "1"}
            if tool.name == "write_file":
                sent |= {"path": "a", "text": "1"}
            if tool.name in ("run_sandbox", "write_file"):
                answer = await client.call_tool(tool.name, sent)
                assert not answer.is_error, answer
        assert [call.rpc for call in r.sandbox.calls if call.rpc != "Check"][-1] == "Write"


def test_the_converters_notice_what_is_not_supported() -> None:
    for schema in ({"type": "string", "maxLength": 3}, {"type": "object", "properties": {}, "$ref": "#/x"}):
        with pytest.raises(AssertionError, match="know"):
            to_openai(schema)
    with pytest.raises(AssertionError, match="know"):
        to_gemini({"type": "string", "anyOf": []})
