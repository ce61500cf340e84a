"""The documentation: its links lead somewhere, its examples run, and it names everything there is."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import itertools
import json
import re
import shlex
import tomllib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import yaml

import prodisco_sandbox
from prodisco_sandbox import SandboxManager, SandboxManagerConfig, errors
from prodisco_sandbox.mcp._options import make_parser, with_file
from prodisco_sandbox.testing import FakeCustomObjectsApi, FakeSandboxServer
from tests.support import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SITE = importlib.import_module("tools.build_docs")
TROUBLESHOOTING = (ROOT / "docs/troubleshooting.md").read_text()

BLOCK = re.compile(r"^( *)```([^\n`]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    found = BLOCK.findall(page.read_text())
    return [
        "".join(line.removeprefix(indent) for line in text.splitlines(keepends=True))
        for indent, name, text in found
        if name == language
    ]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def with_blocks(language: str) -> list[Any]:
    return [pytest.param(page, id=name(page)) for page in PAGES if blocks(page, language)]


# Links


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub and the site make of a page's headings."""
    text = BLOCK.sub("", page.read_text())
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", page.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), target
        assert not anchor or anchor in slugs(found), target


# Examples


class Double(SandboxManager):
    """A manager on doubles, where an example says nothing of a cluster of its own."""

    api: FakeCustomObjectsApi
    server: FakeSandboxServer

    def __init__(self, config: SandboxManagerConfig, **options: Any) -> None:
        if config.mode == "multi" and not options:
            settings = {field: getattr(config, field) for field in config.__dataclass_fields__}
            settings |= {"endpoint": lambda _: self.server.target, "warm_pool": None, "tls": None}
            config, options = SandboxManagerConfig(**settings), {"custom_objects_api": self.api}
        super().__init__(config, **options)


@pytest.fixture
async def doubles(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[type[Double]]:
    async with FakeSandboxServer() as server, FakeCustomObjectsApi(auto_ready=True) as api:
        monkeypatch.setattr(Double, "api", api, raising=False)
        monkeypatch.setattr(Double, "server", server, raising=False)
        monkeypatch.setattr(prodisco_sandbox, "SandboxManager", Double)
        yield Double


def at_hand() -> dict[str, Any]:
    """What an example that is no whole program may take for granted."""
    from contextlib import asynccontextmanager

    from mcp.server.auth.middleware.auth_context import get_access_token

    from prodisco_sandbox.local import LocalCluster

    public = {name: getattr(prodisco_sandbox, name) for name in prodisco_sandbox.__all__}
    return {
        **public,
        "__name__": "example",
        "asynccontextmanager": asynccontextmanager,
        "get_access_token": get_access_token,
        "LocalCluster": LocalCluster,
        "my_state": None,
    }


async def run(text: str, found: dict[str, Any]) -> None:
    is_program = "asyncio.run(main())" in text
    code = compile(text.replace("asyncio.run(main())", ""), "example", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    assert isinstance(code, CodeType)
    if waits := eval(code, found):
        await waits
    if is_program:
        await found["main"]()


SLOW = {"docs/tutorials/getting-started.md", "docs/tutorials/warm-pool.md"}
"""They start several servers, as test_readme.py and tests/local/test_warm.py do at each change."""


# README's other examples are run by tests/project/test_readme.py; what is run on real pods, by tests/e2e.
@pytest.mark.process
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name(page), marks=[pytest.mark.slow] * (name(page) in SLOW))
        for page in PAGES
        if blocks(page, "python") and name(page) != "README.md"
    ],
)
async def test_the_examples_of_a_page_run(
    page: Path, doubles: type[Double], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mcp.server import MCPServer

    monkeypatch.setattr(MCPServer, "run", lambda *_: None)
    found = at_hand()
    for text in blocks(page, "python"):
        await run(text, found)
    printed = capsys.readouterr().out
    match name(page):
        case "docs/tutorials/getting-started.md":
            assert printed.startswith("42\n\nFalse\n")
            assert "No such file or directory" in printed
            assert "hello" in printed
            assert "all 1 sandbox slots are taken" in printed
        case "docs/tutorials/mcp-server.md":
            assert re.fullmatch(r"42\n\n\d+\.\d+\.\d+\n", printed)
        case "docs/tutorials/warm-pool.md":
            assert re.search(r"(1 warm, 0|0 warm, 1) cold\n$", printed)


async def test_readmes_example_for_kubernetes_runs(doubles: type[Double]) -> None:
    [text] = [text for text in blocks(ROOT / "README.md", "python") if text.startswith("config =")]
    await run(text, {**at_hand(), "SandboxManager": doubles})


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_yaml_can_be_read(page: Path) -> None:
    for text in blocks(page, "yaml"):
        assert all(isinstance(part, dict | list) for part in yaml.safe_load_all(text))


@pytest.mark.parametrize("page", with_blocks("json"))
def test_json_is_a_configuration_that_the_program_takes(page: Path) -> None:
    for text in blocks(page, "json"):
        server = json.loads(text)["mcpServers"]["sandbox"]
        assert server["command"] in PROJECT["project"]["scripts"]
        make_parser().parse_args(server["args"])


@pytest.mark.parametrize("page", with_blocks("toml"))
def test_toml_is_a_configuration_that_the_program_takes(page: Path, tmp_path: Path) -> None:
    for text in blocks(page, "toml"):
        (file := tmp_path / "mcp.toml").write_text(text)
        parser = make_parser()
        parser.parse_args(with_file(["--config", str(file)], {}, parser))


ELSEWHERE = {"kind", "docker", "openssl", "umask", "opentelemetry-bootstrap", "opentelemetry-instrument"}
"""Programs of others, whose options are theirs."""


def commands(text: str) -> Iterator[list[str]]:
    shown = [line for line in text.splitlines() if line.startswith("$ ")]
    for line in shown or text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ ").removeprefix("("), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        if words:
            yield words


@pytest.mark.parametrize("page", with_blocks("console"))
def test_commands_are_there(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for text in blocks(page, "console"):
        for program, *arguments in commands(text):
            match Path(program).name:
                case "make":
                    assert {word for word in arguments if "=" not in word} <= set(targets), arguments
                case "kubectl":
                    for flag, value in itertools.pairwise(arguments):
                        assert flag not in ("-k", "-f") or "://" in value or (ROOT / value).exists(), value
                case "pip":
                    for extras in re.findall(r"prodisco-sandbox\[(.*)\]", " ".join(arguments)):
                        assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])
                case "prodisco-sandbox-mcp":
                    make_parser().parse_args(arguments)
                case "python":
                    if arguments[0] == "-m":
                        assert importlib.util.find_spec(arguments[1]) or (ROOT / arguments[1]).is_dir()
                case other:
                    assert other in ELSEWHERE, other


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    checked = {"python", "yaml", "json", "console", "toml", "mermaid", "dockerfile", "text", "{toctree}"}
    for page in PAGES:
        assert {language for _, language, _ in BLOCK.findall(page.read_text())} <= checked, page


def test_the_dockerfile_of_the_documentation_is_built_on_an_image_of_ours() -> None:
    [text] = blocks(ROOT / "docs/server.md", "dockerfile")
    assert text.startswith("FROM prodisco/sandbox-server:latest\n")
    assert {line.split()[0] for line in text.splitlines()} <= {"FROM", "USER", "RUN", "COPY", "ENV"}
    assert "/opt/sandbox/bin/pip" in text
    assert "/opt/sandbox" in (ROOT / "Dockerfile").read_text()


# Completeness


def test_every_public_method_and_property_is_described() -> None:
    lacking = []
    for qualified in (found for page in SITE.public_names().values() for found in page):
        module, _, attribute = qualified.rpartition(".")
        value = getattr(importlib.import_module(module), attribute)
        if not isinstance(value, type):
            continue
        for kind in value.__mro__:
            for member, found in vars(kind).items():
                own = kind.__module__.startswith("prodisco_sandbox") and not member.startswith("_")
                function = getattr(found, "fget", found)
                if own and inspect.isfunction(function) and not inspect.getdoc(getattr(value, member)):
                    lacking.append(f"{qualified}.{member}")
    assert lacking == []


def test_every_public_name_is_in_the_reference() -> None:
    pages = SITE.public_names()
    assert {found.rpartition(".")[2] for page in pages.values() for found in page} >= set(
        prodisco_sandbox.__all__
    )
    index = (ROOT / "docs/index.md").read_text()
    for page, names in pages.items():
        assert names, page
        assert f"\nreference/{page}\n" in index
        text = SITE.reference(page, names)
        assert all(re.search(rf"^\.\. auto\w+:: {re.escape(found)}$", text, re.MULTILINE) for found in names)


def test_every_page_is_in_the_table_of_contents() -> None:
    entries = {
        entry.partition("<")[2].rstrip(">") or entry
        for text in blocks(ROOT / "docs/index.md", "{toctree}")
        for entry in text.splitlines()
        if entry and not entry.startswith(":")
    }
    pages = {name(page).removeprefix("docs/").removesuffix(".md") for page in PAGES if "docs" in page.parts}
    others = {page.removesuffix(".md") for page in SITE.PAGES.values()}
    reference = {f"reference/{page}" for page in SITE.public_names()}
    assert entries == (pages - {"index"}) | others | reference


LEVELS = ("debug", "info", "warning", "error", "exception", "log")


def events() -> dict[str, set[str]]:
    """The events that the library logs, with their levels."""
    found: dict[str, set[str]] = {}
    source = ROOT / "src/prodisco_sandbox"
    for path in source.rglob("*.py"):
        if "server" in path.relative_to(source).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=value, attr=level), args=[*_, ast.Constant(str(event))]
                ):
                    if level in LEVELS and ast.unparse(value).endswith("log") and " " not in event:
                        found.setdefault(event, set()).add("error" if level == "exception" else level)
    return found


def test_every_event_is_explained_with_its_level() -> None:
    explained = dict(re.findall(r"^#### (\w+)\n\n\((\w+)\) \S", TROUBLESHOOTING, re.MULTILINE))
    logged = events()
    assert len(logged) > 60
    assert set(explained) == set(logged)
    for event, levels in logged.items():
        assert explained[event] in levels or "log" in levels, event


def test_every_error_is_explained() -> None:
    explained = re.findall(r"^### (Sandbox\w*Error)$", TROUBLESHOOTING, re.MULTILINE)
    classes = [found for found in vars(errors) if found.endswith("Error")]
    assert sorted(explained) == sorted(classes)
    for found in classes:
        [note] = getattr(errors, found)("no slot").__notes__
        path, anchor = re.fullmatch(r"What to do: (.+)#(\w+) of prodisco-sandbox", note).groups()  # type: ignore[union-attr]
        assert anchor in slugs(ROOT / path)


# Versions


def supported() -> dict[str, list[str]]:
    text = (ROOT / "docs/support.md").read_text()
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_the_versions_that_are_supported_are_those_that_are_tested() -> None:
    table = supported()
    project = PROJECT["project"]
    tested = table["Python"][1].split(", ")
    classifiers = [
        found.rpartition(" ")[2] for found in project["classifiers"] if re.search(r":: 3\.\d", found)
    ]
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert tested == classifiers == workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert table["Python"][0] == f"{project['requires-python'].removeprefix('>=')} or newer"
    [sdk] = [found for found in project["optional-dependencies"]["mcp"] if found.startswith("mcp")]
    lower, upper = re.findall(r"[=<](\d+(?:\.[1-9]\d*)*)", sdk)
    assert table["MCP SDK"][0] == f"{lower} or newer, below {upper}"
    cluster = (ROOT / "docs/kubernetes.md").read_text()
    for thing, title in (("Kubernetes", "kube-apiserver"), ("agent-sandbox", "definitions of agent-sandbox")):
        [row] = [line for line in cluster.splitlines() if line.startswith(f"| {title} |")]
        assert re.findall(r"\d+\.\d+\.\d+", row) == table[thing][1].split(", ")


def test_what_tests_the_versions_is_there() -> None:
    table = supported()
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for thing in table.keys() - {"", "---"}:
        named = re.findall(r"`(.*?)`", table[thing][-1])
        assert named, thing
        for text in named:
            is_there = text.startswith("make ") and text.removeprefix("make ") in targets
            assert is_there or text in (*jobs, "ci", "setup-envtest") or (ROOT / text).exists(), text
    kubernetes = [version.rstrip(".x") for version in jobs["envtest"]["strategy"]["matrix"]["kubernetes"]]
    assert f"takes {' and '.join(kubernetes)}," in table["Kubernetes"][-1]
