"""The package as it is installed: these tests see the built wheel."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import prodisco_sandbox
from tests.support import ROOT
from tests.support.patience import PATIENCE

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


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
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


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
    assert top == {"prodisco_sandbox", f"prodisco_sandbox-{PROJECT['version']}.dist-info"}


def test_every_requirement_has_a_lower_bound() -> None:
    for requirement in PROJECT["dependencies"]:
        assert re.match(r"[\w-]+>=[\d.]+", requirement), requirement


@needs_wheel
@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(tmp_path: Path) -> None:
    def run(*args: str) -> None:
        subprocess.run([sys.executable, "-m", *args], cwd=ROOT, check=True, timeout=2 * PATIENCE)

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
            ["tag v1.2.1: pyproject.toml has the version 1.2.0, so it must be v1.2.0"],
        ),
        ("1.2", None, "## [1.2]", ["version 1.2: it must be X.Y.Z, or X.Y.ZrcN before a release"]),
        ("1.3.0", None, DATED, ["CHANGELOG.md has no section ## [1.3.0]"]),
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


def test_the_workflow_runs_what_ci_run_runs() -> None:
    import yaml

    def commands(name: str) -> dict[str, set[str]]:
        workflow = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())
        return {
            job: {step.get("run", "") for step in found["steps"]} for job, found in workflow["jobs"].items()
        }

    steps = (ROOT / ".ci/run").read_text()
    ours = set(re.findall(r"^(?:timeout \d+ )?(make [^#\n]*?)(?: *#.*)?$", steps, re.MULTILINE))
    assert len(ours) > 8
    # What needs a kube-apiserver runs where .ci/run finds one.
    assert ours <= set().union(*commands("ci").values())
    assert "make reliability" in commands("nightly")["campaigns"]
    assert "make release-check" in commands("release")["build"]
