"""Who may call the program over HTTP, and what the log says of those who do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from mcp import MCPError
from mcp.shared.auth import ProtectedResourceMetadata

from prodisco_sandbox import SandboxManagerConfig
from prodisco_sandbox.mcp import __main__ as program
from prodisco_sandbox.mcp._auth import read_auth_options, server_auth
from prodisco_sandbox.mcp._options import make_parser
from prodisco_sandbox.mcp._serve import make_server, serve_http
from prodisco_sandbox.mcp._tokens import TokenFile
from prodisco_sandbox.testing import FakeCustomObjectsApi, FakeSandboxServer
from tests.support.mcp_server import (
    ERAS,
    INITIALIZE,
    Manager,
    call,
    connect,
    events,
    open_session,
    refused,
    run,
    served,
    tool_call,
)
from tests.support.patience import PATIENCE

from .test_oidc import AUDIENCE, OTHER_KEY, FakeIssuer, in_parts
from .test_real import Program

ANN, BOB = "ann-s3cret-0123456789", "bob/s3cret+0123456789=="
CODE = "print('the-c0de-itself')"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return write(tmp_path / "tokens", f"# who may\n\nann {ANN}\n  bob\t{BOB}  \r\n")


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    """As an editor does: another file takes its place."""
    other = path.with_suffix(".new")
    other.write_text(text)
    other.chmod(mode)
    return other.replace(path)


# Options


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--auth-token-file", "f"], "--auth-token-file is for --transport http"),
        (["--oidc-issuer", "https://i.example"], "--oidc-issuer is for --transport http"),
        (["--oidc-audience", "a"], "--oidc-audience is for --transport http"),
        (["--public-url", "https://m.example"], "--public-url is for --transport http"),
        (["--unauthenticated"], "--unauthenticated is for --transport http"),
        (["--transport", "http", "--oidc-issuer", "https://i.example"], "give both or none"),
        (["--transport", "http", "--oidc-audience", "a"], "give both or none"),
        (["--transport", "http", "--auth-token-file", ""], "--auth-token-file is empty"),
        (["--transport", "http", "--auth-token-file", "f", "--unauthenticated"], "does not go with"),
        (["--transport", "http", "--public-url", "https://m.example"], "--public-url is for --oidc-issuer"),
        (
            ["--transport", "http", "--oidc-issuer", "http://i.example", "--oidc-audience", "a"],
            "--oidc-issuer is 'http://i.example': give an https URL",
        ),
        (
            [
                *("--transport", "http", "--oidc-issuer", "https://i.example", "--oidc-audience", "a"),
                *("--public-url", "m.example/mcp"),
            ],
            "--public-url is 'm.example/mcp': give an https URL",
        ),
    ],
)
def test_wrong_options_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    with pytest.raises(SystemExit) as end:
        program.main(["--local", *arguments])
    assert end.value.code == 2
    assert text in capsys.readouterr().err


def test_variables_stand_for_options_over_http_only() -> None:
    environ = {
        "SANDBOX_AUTH_TOKEN_FILE": "/f",
        "SANDBOX_OIDC_ISSUER": "https://i.example",
        "SANDBOX_OIDC_AUDIENCE": "a",
        "SANDBOX_PUBLIC_URL": "http://m.example/mcp",
    }
    parser = make_parser()
    args = parser.parse_args(["--local", "--transport", "http", "--oidc-audience", "b"])
    read_auth_options(args, environ)
    assert (args.auth_token_file, args.oidc_issuer, args.oidc_audience, args.public_url) == (
        "/f",
        "https://i.example",
        "b",
        "http://m.example/mcp",
    )
    args = parser.parse_args(["--local"])
    read_auth_options(args, environ)
    assert args.auth_token_file is args.oidc_issuer is None
    args = parser.parse_args(["--local", "--transport", "http", "--unauthenticated"])
    with pytest.raises(ValueError, match="does not go with"):
        read_auth_options(args, environ)


@pytest.mark.parametrize(
    ("host", "arguments", "text"),
    [
        ("0.0.0.0", [], "give --auth-token-file or --oidc-issuer, or --unauthenticated"),
        ("::", [], "--host: :: is no loopback address"),
        ("0.0.0.0", ["--oidc-issuer", "https://i.example", "--oidc-audience", "a"], "--public-url is needed"),
        ("127.0.0.1", ["--auth-token-file", "/does/not/exist"], "/does/not/exist"),
    ],
)
def test_what_keeps_it_from_starting(
    capsys: pytest.CaptureFixture[str], host: str, arguments: list[str], text: str
) -> None:
    assert program.main(["--local", "--transport", "http", "--port", "0", "--host", host, *arguments]) == 1
    assert text in capsys.readouterr().err


# The file of tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ann\n", "line 1: give a name and a token"),
        (f"# x\n\nann {ANN} # old\n", "line 3: give a name and a token; comments need lines of their own"),
        (f"ann {ANN}\nbob s3cret", "line 2: the token is too short: give at least 16"),
        (f"{ANN} ann\n", "line 1: the token is too short"),
        (f"ann {ANN}\nann {BOB}\n", "line 2: the name of line 1: each line needs its own"),
        (f"ann {ANN}\nbob {ANN}\n", "line 2: the token of line 1: each line needs its own"),
        (f"ann {ANN},\n", "line 1: a token has only letters, digits"),
        (f"ann {ANN}\N{OWL}\n", "line 1: a token has only letters, digits"),
    ],
)
def test_a_wrong_line_is_named_and_never_quoted(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "tokens", text)
    with pytest.raises(ValueError) as error:
        TokenFile(str(path))
    assert message in str(error.value)
    assert "s3cret" not in str(error.value)


def test_bytes_that_are_no_text_are_no_token(tmp_path: Path) -> None:
    path = write(tmp_path / "tokens", "")
    path.write_bytes(b"ann " + ANN.encode() + b"\xff\n")
    with pytest.raises(ValueError, match="line 1: a token has only"):
        TokenFile(str(path))


@pytest.mark.parametrize(
    ("mode", "right"),
    [
        (0o600, True),
        (0o400, True),
        (0o440, True),
        (0o640, True),
        (0o644, False),
        (0o660, False),
        (0o601, False),
    ],
)
def test_others_must_not_use_the_file(tokens: Path, mode: int, right: bool) -> None:
    tokens.chmod(mode)
    if right:
        assert TokenFile(str(tokens)).find(BOB) == "bob"
        return
    with pytest.raises(ValueError, match=rf"has mode {mode:o}: others can use it; give it 600 or 640"):
        TokenFile(str(tokens))


def test_a_token_is_found_only_whole(tokens: Path) -> None:
    file = TokenFile(str(tokens))
    assert (file.find(ANN), file.find(BOB)) == ("ann", "bob")
    for wrong in ("", ANN[:-1], ANN + "=", ANN.upper(), "ann", f"ann {ANN}", "\N{OWL}", "\xff" * 20):
        assert file.find(wrong) is None


def test_a_changed_file_is_read_again_and_a_bad_one_is_not_used(
    tokens: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = TokenFile(str(tokens))
    write(tokens, f"ann {ANN}\n")
    assert (file.find(ANN), file.find(BOB)) == ("ann", None)
    for break_it in (
        lambda: write(tokens, f"carol {BOB}\nann\n"),
        lambda: write(tokens, f"carol {BOB}\n", mode=0o644),
        tokens.unlink,
    ):
        caplog.clear()
        break_it()
        assert [(file.find(ANN), file.find(BOB)) for _ in range(2)] == [("ann", None)] * 2
        assert caplog.text.count("auth_tokens_kept") == 1, "once for each change"
        assert "s3cret" not in caplog.text
    write(tokens, f"carol {BOB}\n")
    assert (file.find(ANN), file.find(BOB)) == (None, "carol")
    # In place, as `echo >>` does.
    with tokens.open("a") as appended:
        appended.write(f"ann {ANN}\n")
    assert file.find(ANN) == "ann"
    # With as many bytes as before.
    before = tokens.stat()
    tokens.write_text(tokens.read_text().replace(ANN, ANN.swapcase()))
    os.utime(tokens, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert (file.find(ANN), file.find(ANN.swapcase())) == (None, "ann")
    tokens.write_text("")
    assert (file.find(ANN), file.find(BOB)) == (None, None), "all are revoked"


# Over HTTP


@dataclass
class Served:
    url: str
    sandbox: FakeSandboxServer
    manager: Manager


@asynccontextmanager
async def serving(*arguments: str, path: str = "/mcp") -> AsyncIterator[Served]:
    """The program's server with these options, on a cluster in memory."""
    given = ["--local", "--transport", "http", "--port", "0", "--path", path, *arguments]
    args = make_parser().parse_args(given)
    read_auth_options(args, {})
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(program._listener(args))
        assert listener is not None
        host, port = listener.getsockname()[:2]
        auth = server_auth(args, host, port)
        if auth:
            stack.push_async_callback(auth["token_verifier"].aclose)
        sandbox = await stack.enter_async_context(FakeSandboxServer())
        api = await stack.enter_async_context(FakeCustomObjectsApi(auto_ready=True))
        config = SandboxManagerConfig(mode="multi", endpoint=lambda _: sandbox.target, max_sessions=4)
        manager = Manager(config, custom_objects_api=api)
        server, tools = make_server(manager, auth=auth)
        task = asyncio.create_task(
            serve_http(server, tools, listener=listener, path=path, allowed_hosts=[], drain_timeout=0)
        )
        base = f"http://127.0.0.1:{port}"
        async with httpx2.AsyncClient(timeout=PATIENCE, verify=False) as http:
            # With a token that is none: it stays open, also for those.
            answer = await http.get(f"{base}/healthz", headers={"Authorization": "Bearer x"})
            assert answer.status_code == 200
        try:
            yield Served(base + path, sandbox, manager)
        finally:
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
            await served(task)


async def post(url: str, authorization: str | None) -> httpx2.Response:
    headers = {"Accept": "application/json, text/event-stream"}
    if authorization is not None:
        headers["Authorization"] = authorization
    body = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": INITIALIZE}
    async with httpx2.AsyncClient(timeout=PATIENCE, verify=False) as http:
        return await http.post(url, headers=headers, json=body)


@pytest.mark.parametrize("era", ERAS)
async def test_a_token_of_the_file_is_a_principal_until_it_is_revoked(
    tokens: Path, era: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "prodisco_sandbox")
    async with serving("--auth-token-file", str(tokens)) as s:
        async with connect(s.url, era, token=ANN) as ann, connect(s.url, era, token=BOB) as bob:
            await run(ann, CODE)
            await run(bob, CODE)
            assert s.manager.stats().created == 2
            write(tokens, f"ann {ANN}\n")
            await run(ann, CODE)
            with pytest.raises(MCPError, match="Server returned an error response"):
                await call(bob, CODE)
        assert {pairs["principal"] for pairs in events(caplog, "sandbox_call")} == {
            '["ann", null, null]',
            '["bob", null, null]',
        }
        assert {pairs["reason"] for pairs in events(caplog, "auth_refused")} == {"unknown token"}
        # There is no authorization server that metadata could lead to.
        assert "resource_metadata" not in (await post(s.url, None)).headers["WWW-Authenticate"]


async def test_a_handle_and_a_session_are_their_principals_alone(tokens: Path) -> None:
    async with FakeIssuer() as fake:
        options = ("--oidc-issuer", fake.url, "--oidc-audience", AUDIENCE, "--auth-token-file", str(tokens))
        # A subject that is called like a name in the file is somebody else.
        namesake = fake.token(sub="ann")
        async with serving(*options) as s:
            async with (
                connect(s.url, "2026-07-28", token=ANN) as ann,
                connect(s.url, "2026-07-28", token=namesake) as other,
            ):
                handle = (await run(ann, ""))["sandbox"]
                assert "not yours" in await refused(other, "", sandbox=handle)
            async with open_session(s.url, token=ANN) as session_id:
                assert (await tool_call(s.url, session_id, token=ANN)).status_code == 200
                assert (await tool_call(s.url, session_id, token=namesake)).status_code == 404


@pytest.mark.parametrize("era", ERAS)
async def test_a_subject_of_the_issuer_is_a_principal(era: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "prodisco_sandbox")
    async with FakeIssuer("/realm") as fake:
        async with serving("--oidc-issuer", fake.url, "--oidc-audience", AUDIENCE) as s:
            # Another client, and a later token: the same principal.
            for token in (fake.token(azp="one"), fake.token(azp="two", jti="2")):
                async with connect(s.url, era, token=token) as client:
                    await run(client, CODE)
        assert {pairs["principal"] for pairs in events(caplog, "sandbox_call")} == {
            json.dumps(["alice", fake.url, "alice"])
        }


async def test_whoever_is_refused_learns_nothing_of_why_and_the_log_does(
    tokens: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "prodisco_sandbox")
    async with FakeIssuer() as fake:
        refusals = {
            None: "no bearer token",
            f"Basic {ANN}": "no bearer token",
            "Bearer": "no bearer token",
            "Bearer wrong-s3cret-0123456789": "malformed",
            f"Bearer {ANN}x": "malformed",
            f"Bearer {fake.token(exp=1)}": "expired",
            f"Bearer {fake.token(aud='mail')}": "other audience",
            f"Bearer {fake.token(iss='https://evil.example')}": "other issuer",
            f"Bearer {fake.token(OTHER_KEY)}": "wrong signature",
            f"Bearer {fake.token(None, algorithm='none')}": "algorithm not allowed",
            f"Bearer {in_parts({'alg': 'HS256'}, {'sub': 'alice'}, b'x')}": "algorithm not allowed",
        }
        options = ("--oidc-issuer", fake.url, "--oidc-audience", AUDIENCE, "--auth-token-file", str(tokens))
        async with serving(*options) as s:
            answers = {sent: await post(s.url, sent) for sent in refusals}
            assert (await post(s.url, f"bearer {ANN}")).status_code == 200
            assert (await post(s.url, f"Bearer {fake.token()}")).status_code == 200
        assert {answer.status_code for answer in answers.values()} == {401}
        (body,) = {answer.text for answer in answers.values()}
        assert json.loads(body) == {"error": "invalid_token", "error_description": "Authentication required"}
        assert len({answer.headers["WWW-Authenticate"] for answer in answers.values()}) == 1
        logged = events(caplog, "auth_refused")
        assert [pairs["reason"] for pairs in logged] == list(refusals.values())
        assert {pairs["address"] for pairs in logged} == {"127.0.0.1"}
        for sent in refusals:
            assert sent is None or sent.split()[-1] not in caplog.text.replace("no bearer token", "")
        assert s.manager.stats().created == 0


@pytest.mark.parametrize(
    ("path", "public", "resource", "metadata"),
    [
        ("/mcp", None, "{base}/mcp", "{base}/.well-known/oauth-protected-resource/mcp"),
        ("/", None, "{base}/", "{base}/.well-known/oauth-protected-resource"),
        (
            "/mcp",
            "https://mcp.example.com/sandbox",
            "https://mcp.example.com/sandbox",
            "https://mcp.example.com/.well-known/oauth-protected-resource/sandbox",
        ),
    ],
)
async def test_a_refusal_leads_to_the_authorization_server(
    path: str, public: str | None, resource: str, metadata: str
) -> None:
    async with FakeIssuer("/realm") as fake:
        options = ["--oidc-issuer", fake.url, "--oidc-audience", AUDIENCE]
        if public is not None:
            options += ["--public-url", public]
        async with serving(*options, path=path) as s, httpx2.AsyncClient(verify=False) as http:
            base = s.url.removesuffix(path)
            challenge = (await post(s.url, None)).headers["WWW-Authenticate"]
            url = metadata.format(base=base)
            assert challenge.startswith("Bearer ")
            assert f'resource_metadata="{url}"' in challenge
            answer = await http.get(base + url[url.index("/.well-known") :])
            about = ProtectedResourceMetadata.model_validate_json(answer.content)
            assert str(about.resource) == resource.format(base=base)
            assert [str(each) for each in about.authorization_servers] == [fake.url]


async def test_without_authentication_the_principal_is_nobody(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "prodisco_sandbox")
    async with (
        serving("--host", "0.0.0.0", "--unauthenticated") as s,
        connect(s.url, "2026-07-28", token="anything") as client,
    ):
        await run(client, CODE)
    assert [pairs["principal"] for pairs in events(caplog, "sandbox_call")] == [None]


@pytest.mark.slow
async def test_no_token_code_session_or_handle_is_in_the_programs_log(tokens: Path, tmp_path: Path) -> None:
    async with FakeIssuer() as fake:
        good, bad = fake.token(), fake.token(exp=1)
        options = ("--oidc-issuer", fake.url, "--oidc-audience", AUDIENCE, "--auth-token-file", str(tokens))
        log = tmp_path / "log"
        async with Program(log, "--port", "0", "--log-level", "debug", *options) as running:
            secrets = [ANN, BOB, good, bad, "c0de"]
            for token in (ANN, good):
                async with connect(running.url, "2026-07-28", token=token) as client:
                    secrets.append((await run(client, CODE))["sandbox"])
                async with open_session(running.url, token=token) as session_id:
                    secrets.append(session_id)
                    assert (await tool_call(running.url, session_id, token=token)).status_code == 200
                    # Somebody else's, which the SDK says in its log with the id.
                    assert (await tool_call(running.url, session_id, token=BOB)).status_code == 404
            for token in (bad, ANN + "x"):
                assert (await post(running.url, f"Bearer {token}")).status_code == 401
            write(tokens, f"ann {ANN}\nbob {BOB[:5]}\n")
            assert (await post(running.url, f"Bearer {BOB}")).status_code == 200
            running.process.terminate()
            async with httpx2.AsyncClient(timeout=PATIENCE, verify=False) as http:
                while (await http.get(running.url.replace("/mcp", "/readyz"))).status_code == 200:
                    await asyncio.sleep(0.01)
            running.process.terminate()  # It need not wait for what clients may still ask.
            async with asyncio.timeout(PATIENCE):
                await running.process.wait()
        text = log.read_text()
        for event in ("sandbox_call", "auth_refused", "auth_tokens_kept", "oidc_keys_fetched"):
            assert event in text
        assert "Traceback" not in text
        for secret in secrets:
            assert secret not in text
            assert os.fsencode(secret).hex() not in text
