"""The package as it is installed: these tests see the built wheel."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import prodisco_sandbox
from tests.support import ROOT
from tests.support.patience import PATIENCE

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = importlib.metadata.version("prodisco-sandbox")


def loaded_after(code: str) -> set[str]:
    """The modules of a fresh interpreter that ran `code`."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}\nimport json, sys; print(json.dumps([*sys.modules]))"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
    )
    return set(json.loads(done.stdout))


def of_package(modules: set[str]) -> set[str]:
    return {
        name.removeprefix("prodisco_sandbox.") for name in modules if name.startswith("prodisco_sandbox.")
    }


# What an import costs

HEAVY = {"kubernetes_asyncio", "aiohttp", "grpc", "structlog", "google.protobuf", "mcp", "asyncio"}
UNASKED = {"server", "testing", "local", "mcp"}


def test_importing_the_package_loads_nothing() -> None:
    modules = loaded_after("import prodisco_sandbox")
    assert not of_package(modules)
    assert not HEAVY & modules


def test_the_public_names_load_neither_server_nor_test_doubles_nor_kubernetes() -> None:
    modules = loaded_after("from prodisco_sandbox import *; import prodisco_sandbox.proto")
    assert of_package(modules) >= {"manager", "client", "config", "errors"}
    assert not {name for name in of_package(modules) if name.split(".")[0] in UNASKED}
    assert not {"kubernetes_asyncio", "aiohttp", "mcp"} & modules


def test_a_manager_of_single_mode_loads_no_kubernetes() -> None:
    modules = loaded_after(
        "from prodisco_sandbox import SandboxManager, SandboxManagerConfig\n"
        "SandboxManager(SandboxManagerConfig(mode='single'))"
    )
    assert not {"kubernetes_asyncio", "aiohttp"} & modules
    assert "kubernetes" not in of_package(modules)


def test_a_cluster_in_memory_loads_no_kubernetes() -> None:
    """Refusals, discovery and watches, too: a local cluster is one."""
    modules = loaded_after(
        "import asyncio\n"
        "import prodisco_sandbox.local\n"
        "from prodisco_sandbox import SandboxManager, SandboxManagerConfig\n"
        "from prodisco_sandbox.testing import FakeCustomObjectsApi, FakeSandboxServer\n"
        "async def main():\n"
        "    async with FakeSandboxServer() as server, FakeCustomObjectsApi(auto_ready=True) as api:\n"
        "        config = SandboxManagerConfig(mode='multi', endpoint=lambda _: server.target)\n"
        "        async with SandboxManager(config, custom_objects_api=api) as manager:\n"
        "            assert (await manager.get_client('session')).sandbox\n"
        "            assert {'discovery', 'watch', 'create'} <= {r.verb for r in api.requests}\n"
        "asyncio.run(main())"
    )
    assert not {"kubernetes_asyncio", "aiohttp"} & modules


def test_errors_that_tests_make_are_those_of_kubernetes() -> None:
    loaded_after(
        "from prodisco_sandbox.testing import api_error\n"
        "from kubernetes_asyncio.client import ApiException\n"
        "assert isinstance(api_error(503), ApiException)"
    )


def test_the_server_loads_no_part_of_the_manager() -> None:
    modules = loaded_after("import prodisco_sandbox.server.__main__, prodisco_sandbox.server._app")
    assert {name.split(".")[0] for name in of_package(modules)} == {"server", "proto"}
    assert "opentelemetry" not in modules


# Names


def test_every_public_name_is_there() -> None:
    assert len(set(prodisco_sandbox.__all__)) == len(prodisco_sandbox.__all__)
    for name in prodisco_sandbox.__all__:
        value = getattr(prodisco_sandbox, name)
        assert value.__name__ == name
        assert value.__doc__, f"{name} has no docstring"
    assert set(prodisco_sandbox.__all__) <= set(dir(prodisco_sandbox))


def test_every_error_and_setting_is_public() -> None:
    from prodisco_sandbox import config, errors, results

    public = set(prodisco_sandbox.__all__)
    assert {name for name in vars(errors) if name.endswith("Error")} <= public
    assert {"SandboxManagerConfig", "TlsConfig"} <= public
    assert {
        name
        for name, value in vars(results).items()
        if isinstance(value, type) and value.__module__ == results.__name__ and not name.startswith("_")
    } <= public
    assert config.SandboxManagerConfig is prodisco_sandbox.SandboxManagerConfig


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'prodisco_sandbox' has no attribute 'SandboxManger'$"):
        prodisco_sandbox.SandboxManger  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="SandboxManger"):
        from prodisco_sandbox import SandboxManger  # type: ignore[attr-defined]  # noqa: F401


# What is in the wheel


needs_wheel = pytest.mark.skipif(
    ROOT / "src" in Path(prodisco_sandbox.__file__).parents and not os.environ.get("CI"),
    reason="the package is installed editable; `make test` installs the wheel",
)


def test_metadata() -> None:
    metadata = importlib.metadata.metadata("prodisco-sandbox")
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?(\.dev\d+)?", VERSION)
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert f"## [{'Unreleased' if '.dev' in VERSION else VERSION}]" in (ROOT / "CHANGELOG.md").read_text()


@needs_wheel
def test_the_package_is_typed_and_whole() -> None:
    files = importlib.metadata.files("prodisco-sandbox")
    assert files is not None
    names = {str(file) for file in files}
    sources = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src").rglob("*")
        if path.suffix in (".py", ".pyi", ".proto", ".typed")
    }
    assert "prodisco_sandbox/py.typed" in sources
    assert sources <= names, "what is in src is in the wheel"
    top = {file.parts[0] for file in files if "bin" not in file.parts}
    assert top == {"prodisco_sandbox", f"prodisco_sandbox-{VERSION}.dist-info"}


def test_every_requirement_has_a_lower_bound() -> None:
    for requirement in PROJECT["dependencies"]:
        assert re.match(r"[\w-]+>=[\d.]+", requirement), requirement


@needs_wheel
@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(tmp_path: Path) -> None:
    def run(*args: str) -> None:
        subprocess.run([sys.executable, "-m", *args], cwd=ROOT, env=env, check=True, timeout=2 * PATIENCE)

    env = {**os.environ, "SETUPTOOLS_SCM_PRETEND_VERSION": VERSION}  # commits may have come since
    run("hatchling", "build", "-t", "sdist", "-d", str(tmp_path))
    [sdist] = tmp_path.iterdir()
    with tarfile.open(sdist) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    assert {"Makefile", "CHANGELOG.md", "LICENSE", "README.md", "tests/conftest.py"} <= inside

    run("pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(sdist))
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        built = set(archive.namelist())
        [license_file] = [name for name in built if name.endswith("/licenses/LICENSE")]
        assert b"MIT License" in archive.read(license_file)
    assert built == {
        str(file)
        for file in importlib.metadata.files("prodisco-sandbox") or ()
        if file.suffix != ".pyc"
        and file.parts[0] != ".."  # the command in bin/
        and file.name not in ("INSTALLER", "REQUESTED", "direct_url.json")
    }


# Releases


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with the settings of this one and a commit without a tag."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".gitignore").write_text("out/\n")
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def git(directory: Path, *args: str) -> None:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *args], cwd=directory, check=True, timeout=PATIENCE)


def commit(directory: Path) -> None:
    git(directory, "add", "--all")
    git(directory, "commit", "--quiet", "--allow-empty", "--message=One more")


def version_in(directory: Path, **env: str) -> str:
    command = [sys.executable, "-m", "hatchling", "version"]
    env = {**os.environ, **env}
    return subprocess.check_output(command, cwd=directory, env=env, text=True, timeout=PATIENCE).strip()


@pytest.mark.slow
def test_the_version_is_the_tags(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    fallback = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["version"]
    assert fallback["fallback-version"] == "0.1.0"
    assert version_in(clone) == "0.1.1.dev1"

    git(clone, "tag", "v1.2.3")
    assert version_in(clone) == "1.2.3"
    shallow = tmp_path_factory.mktemp("shallow")
    git(shallow, "clone", "--quiet", "--depth=1", f"file://{clone}", ".")
    assert version_in(shallow) == "1.2.3"

    commit(clone)
    assert version_in(clone) == "1.2.4.dev1"
    assert version_in(clone, SETUPTOOLS_SCM_PRETEND_VERSION="1.9.0") == "1.9.0"
    git(shallow, "tag", "--delete", "v1.2.3")
    assert version_in(shallow) == "0.1.1.dev1"


@pytest.mark.slow
def test_the_version_is_the_fallback_where_git_is_missing(clone: Path) -> None:
    git(clone, "tag", "v1.2.3")
    assert version_in(clone, PATH=str(clone / "nothing")) == "0.1.0"
    shutil.rmtree(clone / ".git")
    assert version_in(clone) == "0.1.0"


@pytest.mark.slow
def test_an_sdist_keeps_its_version_without_git(clone: Path) -> None:
    git(clone, "tag", "v1.2.3")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", "out"]
    subprocess.run(command, cwd=clone, check=True, timeout=PATIENCE)
    with tarfile.open(clone / "out/prodisco_sandbox-1.2.3.tar.gz") as tar:
        tar.extractall(clone / "out", filter="data")
    assert version_in(clone / "out/prodisco_sandbox-1.2.3") == "1.2.3"


DATED = "# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2027-01-31\n\n### Added\n\n- It.\n"


@pytest.mark.parametrize(
    ("version", "tag", "changelog", "wrong"),
    [
        ("1.2.0", "v1.2.0", DATED, []),
        ("1.2.0", None, DATED, []),
        (
            "1.2.0",
            "v1.2.1",
            DATED,
            ["tag v1.2.1: the version is 1.2.0, so it must be v1.2.0, and the tree without changes"],
        ),
        ("1.2.1.dev4", None, DATED, []),
        (
            "1.2.1.dev4",
            None,
            DATED.replace("[Unreleased]", "[Next]"),
            ["CHANGELOG.md has no section ## [Unreleased]"],
        ),
        (
            "1.2",
            "v1.2",
            "## [1.2] - 2027-01-31",
            [
                "version 1.2: it must be X.Y.Z, or X.Y.ZrcN before a release",
            ],
        ),
        (
            "1.3.0",
            "v1.3.0",
            DATED,
            [
                "CHANGELOG.md has no section ## [1.3.0]",
                "CHANGELOG.md: the first release must be ## [1.3.0] with its date",
            ],
        ),
        (
            "1.2.0",
            "v1.2.0",
            DATED.replace("## [1.2", "### Fixed\n\n- More.\n\n## [1.2"),
            ["CHANGELOG.md: what is under Unreleased belongs to this release"],
        ),
        (
            "1.2.0",
            "v1.2.0",
            DATED.replace(" - 2027-01-31", ""),
            ["CHANGELOG.md: the first release must be ## [1.2.0] with its date"],
        ),
    ],
)
def test_a_release_is_consistent(version: str, tag: str | None, changelog: str, wrong: list[str]) -> None:
    assert importlib.import_module("tools.release_check").check_version(version, tag, changelog) == wrong


def workflow(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())
    return found


def commands(name: str) -> dict[str, set[str]]:
    jobs = workflow(name)["jobs"]
    return {job: {step.get("run", "") for step in found["steps"]} for job, found in jobs.items()}


def test_the_workflow_runs_what_ci_run_runs() -> None:
    steps = (ROOT / ".ci/run").read_text()
    ours = set(re.findall(r"^ *(?:\S+=\S+ .*|timeout \d+ )?(make [^#\n]*?)(?: *#.*)?$", steps, re.MULTILINE))
    assert len(ours) > 9
    assert "make envtest" in ours
    assert ours <= set().union(*commands("ci").values())
    assert "tools/cluster-tests" in steps
    assert "tools/kind-tests" in commands("ci")["cluster"]
    assert {"make reliability", "make bench"} <= commands("nightly")["campaigns"]
    assert "make release-check" in commands("nightly")["images"]
    assert "make compat" in commands("compat")["clients"]
    assert "make release-check DIST=dist" in commands("release")["build"]


WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_pins_what_it_uses_and_runs_what_is_there(path: Path) -> None:
    for line in re.findall(r"uses: (.*)", path.read_text()):
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in (command.split() for job in commands(path.stem).values() for command in job if command):
        if words[0] == "make":
            assert words[1] in targets
        elif words[0].startswith("tools/"):
            assert os.access(ROOT / words[0], os.X_OK)
        else:
            assert words[0] in ("git", "echo")


def test_the_images_of_a_release_are_those_that_are_checked() -> None:
    check = importlib.import_module("tools.release_check")
    images = workflow("release")["jobs"]["images"]
    [build] = [step["with"] for step in images["steps"] if "build-push-action" in step.get("uses", "")]
    assert images["strategy"]["matrix"]["target"] == [*check.TARGETS]
    assert build["platforms"] == ",".join(check.PLATFORMS)
    assert (build["sbom"], build["provenance"]) == (True, "mode=max")
    assert {f"AS {target}" for target in check.TARGETS} <= set(
        re.findall(r"AS \S+", (ROOT / "Dockerfile").read_text())
    )


DOCKER = """#!/bin/sh
case "$2 $ANSWER" in
    "version none") echo "unknown command: docker buildx" >&2; exit 1 ;;
    "inspect down") echo "Cannot connect to the Docker daemon" >&2; exit 1 ;;
    "inspect driver") echo "Driver: docker" ;;
    "inspect amd64") echo "Driver: docker-container"; echo "Platforms: linux/amd64, linux/386" ;;
    "inspect all") echo "Driver: docker-container"; echo "Platforms: linux/amd64, linux/arm64" ;;
esac
"""


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("none", "docker buildx version: unknown command: docker buildx"),
        ("down", "docker buildx inspect: Cannot connect to the Docker daemon"),
        ("driver", "docker's builder makes no SBOM: docker buildx create --use"),
        (
            "amd64",
            "docker's builder lacks linux/arm64: set up QEMU (tonistiigi/binfmt)",
        ),
        ("all", None),
    ],
)
def test_why_images_are_not_built_is_said(
    answer: str, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (docker := tmp_path / "docker").write_text(DOCKER)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ANSWER", answer)
    assert importlib.import_module("tools.release_check").missing_builder() == "docker is not installed"
    docker.chmod(0o755)
    assert importlib.import_module("tools.release_check").missing_builder() == reason
