"""What models send in place of the right arguments: what is taken for them, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from mcp import Client
from mcp.server import MCPServer
from mcp.server.mcpserver import Context

from prodisco_sandbox.mcp._language import language_of
from prodisco_sandbox.mcp._reading import PARAMETERS, Call, WrongCallError, read_call
from tests.support.mcp_server import ERAS, META, headers, open_session, over_http, refused, rig, run
from tests.support.patience import PATIENCE

PYTHON, TYPESCRIPT = language_of("Python"), language_of("TypeScript")
LIST, STATUS = {"mode": "list"}, {"mode": "status", "execution_id": "e1"}


def read(**sent: Any) -> Call:
    return read_call(sent, PYTHON)


def refusal(language: str = "Python", **sent: Any) -> str:
    with pytest.raises(WrongCallError) as caught:
        read_call(sent, language_of(language))
    text = str(caught.value)
    assert len(text) < 700
    for word in ("pydantic", "validation error", "input_value", "type="):
        assert word not in text
    return text


NOTHING: list[Any] = [
    None,
    "",
    "  ",
    0,
    0.0,
    False,
    [],
    {},
    "null",
    "None",
    "NULL",
    "undefined",
    '""',
    "'null'",
]


@pytest.mark.parametrize("nothing", NOTHING, ids=repr)
def test_empty_values_and_zeros_mean_that_a_parameter_was_left_out(nothing: Any) -> None:
    empty = dict.fromkeys(PARAMETERS, nothing)
    assert read(**(empty | {"code": "print(1)"})) == Call(code="print(1)")
    assert read(**(empty | {"code": "1", "mode": "stream"})) == Call(mode="stream", code="1")
    assert read(**(empty | LIST)) == Call(mode="list")
    assert read(**(empty | STATUS)) == Call(mode="status", execution_id="e1")
    assert read(**(empty | {"mode": "test", "tests": "t"})).mode == "test"
    # These may be code, too; beside a cached script they are nothing.
    empty["code"] = nothing if nothing in ("", "  ") or not isinstance(nothing, str) else None
    assert read(**(empty | {"cached": "c"})) == Call(cached="c")


def test_zeros_as_text_are_zeros() -> None:
    assert read(code="1", timeout_ms="0", limit="0") == Call(code="1")
    assert read(**LIST, limit="0.0", include_completed_within_ms="0") == Call(mode="list")
    assert read(**STATUS, output_offset="0", error_output_offset="-0").output_offset == 0


@pytest.mark.parametrize(
    "code", ["", " ", "null", "None", "[1, 2]", '{"a": 1}', "123", '"text"', "a\r\nb", "0"]
)
def test_code_is_taken_as_it_is(code: str) -> None:
    assert read(code=code).code == code


def test_code_may_come_as_a_number_and_behind_a_byte_order_mark() -> None:
    assert (read(code=42).code, read(code=1.5).code) == ("42", "1.5")
    assert read(code="\ufeffprint(1)").code == "print(1)"
    assert read(mode="test", code="\ufeffa = 1", tests="\ufeff\ufeffb").tests == "b"
    assert read(code="print('\ufeff')").code == "print('\ufeff')"


@pytest.mark.parametrize("value", [5000, 5000.0, "5000", " 5000 ", "5000.0", "5e3", "+5000", '"5000"'])
def test_numbers_may_be_text(value: Any) -> None:
    assert read(code="1", timeout_ms=value).timeout_ms == 5000
    assert read(**LIST, include_completed_within_ms=value).include_completed_within_ms == 5000
    assert read(**STATUS, output_offset=value).output_offset == 5000


NO_NUMBERS: list[Any] = [
    -1,
    "-1",
    1.5,
    "1.5",
    True,
    "true",
    "5s",
    "5,000",
    "5_000",
    "soon",
    [5],
    {"ms": 5},
    float("nan"),
    float("inf"),
    "NaN",
    "1e400",
    10**400,
    -(10**5000),
    "9" * 5000,
    "٣",
    "0x10",
    "x" * 10_000,
    "\ud800",
]


@pytest.mark.parametrize(
    ("name", "least", "most", "rest"),
    [
        ("timeout_ms", 1, "120000", {"code": "1"}),
        ("limit", 1, "1000", LIST),
        ("include_completed_within_ms", 0, "2147483000", LIST),
        ("output_offset", 0, "", STATUS),
        ("error_output_offset", 0, "", STATUS),
    ],
)
def test_what_is_no_number_in_range_is_refused(
    name: str, least: int, most: str, rest: dict[str, Any]
) -> None:
    for value in NO_NUMBERS:
        text = refusal(**rest, **{name: value})
        assert text.startswith(f"`{name}` is ")
        assert "a whole number" in text
        assert f"greater than or equal to {least}" in text
        assert most in text


@pytest.mark.parametrize(
    "value",
    [
        "RUNNING FAILED",
        "running, failed",
        '["RUNNING", "FAILED"]',
        "[RUNNING,FAILED]",
        "['running'; 'failed']",
        ["RUNNING", "FAILED"],
        [" running ", "Failed", ""],
        ["EXECUTION_STATE_RUNNING", "failed", None],
    ],
    ids=repr,
)
def test_states_may_be_words_in_any_case(value: Any) -> None:
    assert read(**LIST, states=value).states == ("RUNNING", "FAILED")


def test_states_have_their_usual_spellings() -> None:
    assert read(**LIST, states="COMPLETED").states == ("COMPLETED",)
    assert read(**LIST, states=["canceled", "timed-out"]).states == ("CANCELLED", "TIMEOUT")


@pytest.mark.parametrize(
    "value",
    [
        "GONE",
        ["RUNNING", "GONE"],
        "not running",
        2,
        "2",
        [2],
        [["RUNNING"]],
        {"state": "RUNNING"},
        True,
        '{"state": "RUNNING"}',
        "\ud800",
    ],
    ids=lambda value: str(type(value)),
)
def test_what_is_no_state_is_refused(value: Any) -> None:
    text = refusal(**LIST, states=value)
    assert text.startswith("`states` has ")
    assert "'PENDING', 'RUNNING', 'COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT'" in text


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        (True, True),
        ("true", True),
        ("TRUE", True),
        (1, True),
        (1.0, True),
        ("1", True),
        ("yes", True),
        ("false", False),
        ("False", False),
        ("no", False),
        ("off", False),
        ('"true"', True),
    ],
)
def test_booleans_may_be_text(value: Any, meant: bool) -> None:
    assert read(**STATUS, wait=value).wait is meant


@pytest.mark.parametrize("value", [2, "2", "maybe", [True], {"wait": True}, -1], ids=repr)
def test_what_is_no_boolean_is_refused(value: Any) -> None:
    assert "`wait` is" in refusal(**STATUS, wait=value)


@pytest.mark.parametrize("value", ["list", "LIST", " List\n", '"list"'])
def test_a_mode_may_be_in_any_case(value: str) -> None:
    assert read(mode=value).mode == "list"


@pytest.mark.parametrize("value", ["run", "exec", 1, ["list"], {"mode": "list"}, True, "x" * 10_000])
def test_what_is_no_mode_is_refused(value: Any) -> None:
    text = refusal(mode=value, code="1")
    assert text.startswith("`mode` is ")
    assert "'execute', 'stream', 'async', 'status', 'cancel', 'list', 'test'" in text


def test_names_may_be_numbers_and_have_white_space_or_quotes_around_them() -> None:
    assert read(mode="cancel", execution_id=17).execution_id == "17"
    assert read(mode="cancel", execution_id=' "e1"\n').execution_id == "e1"
    assert read(code="1", sandbox=" sbx_x ").sandbox == "sbx_x"


@pytest.mark.parametrize("value", [["e1"], {"id": "e1"}, True, 1.5, 10**5000], ids=lambda v: str(type(v)))
@pytest.mark.parametrize("name", ["execution_id", "cached", "sandbox"])
def test_what_is_no_name_is_refused_without_a_word_of_what_it_was(name: str, value: Any) -> None:
    mode = {"execution_id": "status"}.get(name, "execute")
    text = refusal(mode=mode, **{name: value})
    assert text.startswith(f"`{name}` is a")
    assert "e1" not in text


@pytest.mark.parametrize("value", [["print(1)"], {"code": "1"}, True])
@pytest.mark.parametrize("name", ["code", "tests"])
def test_what_is_no_program_is_refused(name: str, value: Any) -> None:
    text = refusal(mode="test", **{"tests": "t", name: value})
    assert text.startswith(f"`{name}` is a")
    assert "one string" in text
    assert "print(1)" not in text


@pytest.mark.parametrize(
    "mark", ["```", "```python", "```Python3", "```{.python}", "````py", "``` python title=a"]
)
def test_a_fence_around_all_of_the_code_is_taken_away_and_that_is_said(mark: str) -> None:
    end = "`" * (len(mark) - len(mark.lstrip("`")))
    call = read(code=f"\n{mark}\nx = 1\nprint(x)\n{end}\n")
    assert call.code == "x = 1\nprint(x)\n"
    assert "fence around `code` was taken away" in call.notes[0]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("```bash\nls\n```", "a Markdown block of 'bash', but this sandbox runs Python"),
        ("```python\nprint(1)\n", "begins with a Markdown fence"),
        ("```python\nprint(1)\n```\nThat prints 1.", "begins with a Markdown fence"),
        ("```python\na\n```\n```python\nb\n```", "begins with a Markdown fence"),
        ("```print(1)```", "begins with a Markdown fence"),
        ("```", "begins with a Markdown fence"),
    ],
)
def test_other_fences_are_refused(code: str, text: str) -> None:
    assert text in refusal(code=code)


def test_a_fence_within_code_is_code() -> None:
    code = 'DOC = """\n```python\n1\n```\n"""'
    assert read(code=code) == Call(code=code)


def test_fences_are_marked_with_the_sandboxs_language() -> None:
    assert read_call({"code": "```ts\nlet a\n```"}, TYPESCRIPT).code == "let a\n"
    assert read_call({"code": "```ruby\np 1\n```"}, language_of("Ruby")).code == "p 1\n"
    assert "block of 'python', but this sandbox runs TypeScript" in refusal(
        "TypeScript", code="```python\n1\n```"
    )


def test_names_may_be_spelled_otherwise() -> None:
    sent = {
        "Mode": "status",
        "executionId": "e1",
        "output-offset": "7",
        "ERROR_OUTPUT_OFFSET": 8,
        "timeoutMs": 9,
    }
    assert read(**sent) == Call(
        mode="status", execution_id="e1", output_offset=7, error_output_offset=8, timeout_ms=9
    )


def test_what_is_no_parameter_is_told() -> None:
    call = read(code="1", timeout=5, language="python", _meta={"a": 1}, empty="", Code="2")
    assert call.code == "1"
    assert call.notes == (
        "Ignored, because the tool has no such parameter:"
        " `timeout` (`timeout_ms`?), `language`, `Code` (`code`?).",
    )
    many = read(code="1", **{f"{n}" * 100: n for n in range(1, 10)}).notes[0]
    assert "and 4 more" in many
    assert len(many) < 400
    assert "no such parameter: `script`" in refusal(script="print(1)")
    # Nothing that a transport could not encode.
    assert "`\\ud800`" in refusal(arguments=r'{"\ud800": 1}')


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        ({"code": "1", "tests": "def test(): ..."}, "tests"),
        ({"code": "1", "execution_id": "e1"}, "execution_id"),
        ({"mode": "status", "execution_id": "e1", "code": "1"}, "code"),
        ({"mode": "test", "tests": "1", "cached": "c"}, "cached"),
    ],
)
def test_what_the_mode_does_not_use_is_ignored_and_told_where_it_tells_what_is_wanted(
    sent: dict[str, Any], name: str
) -> None:
    assert any(note.startswith(f"`{name}` was ignored") for note in read(**sent).notes)


def test_what_the_mode_does_not_use_is_no_reason_to_refuse() -> None:
    call = read(code="1", states="GONE", limit=-1, wait="maybe", output_offset=-1)
    assert call == Call(code="1")


# Arguments that are no object


@pytest.mark.parametrize("arguments", ['{"code": "print(1)"}', {"code": "print(1)"}])
def test_arguments_as_text_or_within_an_object_are_the_arguments(arguments: Any) -> None:
    assert read(arguments=arguments, mode=None) == Call(code="print(1)")


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ("print(1)", "a string"),
        (["print(1)"], "an array"),
        (5, "a number"),
        (True, "a boolean"),
        ("[" * 100_000, "a string"),
        ("9" * 5000, "a string"),
        ('"{}"', "a string"),
    ],
    ids=lambda value: str(type(value)),
)
def test_arguments_that_are_no_object_are_refused(arguments: Any, kind: str) -> None:
    assert f"The arguments are {kind}: they must be an object" in refusal(arguments=arguments)


@pytest.mark.parametrize("arguments", [[], "", "null", 0])
def test_arguments_that_are_empty_lack_something(arguments: Any) -> None:
    assert "needs `code`" in refusal(arguments=arguments)


async def test_notes_come_with_the_result_and_a_refusal_costs_no_sandbox() -> None:
    async with rig() as r, Client(r.server, mode="legacy") as client:
        assert "`limit`" in await refused(client, mode="list", limit="many")
        assert "no such parameter: `script`" in await refused(client, script="1")
        assert r.manager.stats().created == 0
        result = await run(client, "```python\n1\n```", timeout=5)
        assert "fence around `code`" in result["note"]
        assert "`timeout` (`timeout_ms`?)" in result["note"]
        assert (await r.sandbox.wait_for_call("ExecuteStream")).request.code == "1\n"


@pytest.mark.parametrize("era", ERAS)
async def test_over_http_too_arguments_that_are_no_object_get_a_sentence(era: str) -> None:
    async with (
        rig() as r,
        over_http(r.server) as url,
        httpx2.AsyncClient(timeout=PATIENCE, verify=False) as http,
    ):
        for arguments in (["print(1)"], "print(1)", 5, {"code": ["print(1)"]}):
            async with open_session(url) as session_id:
                given = headers(session_id if era == "legacy" else None, None)
                params: dict[str, Any] = {"name": "run_sandbox", "arguments": arguments}
                if era != "legacy":
                    given |= {
                        "MCP-Protocol-Version": era,
                        "Mcp-Method": "tools/call",
                        "Mcp-Name": "run_sandbox",
                    }
                    params["_meta"] = META
                body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
                answer = await http.post(url, json=body, headers=given)
            assert "must be an object" in answer.text or "`code` is an array" in answer.text
        assert r.manager.stats().created == 0


async def test_a_tool_that_calls_this_one_has_arguments_of_its_own() -> None:
    async with rig() as r:
        server: MCPServer[Any] = r.server

        async def shout(ctx: Context[Any, Any], words: str) -> str:
            called = await server.call_tool("run_sandbox", {"code": f"print({words!r})"}, ctx)
            return json.dumps(called.structured_content)  # type: ignore[union-attr]

        server.add_tool(shout)
        async with Client(server, mode="legacy") as client:
            result = await client.call_tool("shout", {"words": "hey"})
        assert "note" not in json.loads(result.structured_content["result"])
