"""Builds what a release uploads and checks it: all of a release but the upload.

    python tools/release_check.py [DIRECTORY]

The sdist is built from the tree, the wheel from the sdist, and an SBOM from the wheel as it installs with all
its extras. Images are built for every platform, with their SBOMs, where docker has a builder for that. If
HEAD has a tag, version and changelog have to agree with it. With a DIRECTORY the files are left there:
what goes to PyPI in ``pypi``, the wheel's SBOM in ``sbom``, and the images in ``images``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("sandbox-server", "mcp-server")
PLATFORMS = ("linux/amd64", "linux/arm64")
TOOL_EXTRAS = {"docs", "release", "typing", "dev"}
"""Extras that nothing but this repository uses."""


def check_version(version: str, tag: str | None, changelog: str) -> list[str]:
    """What is wrong with what is to be released; between releases there is no tag."""
    if tag is None:
        return [] if "## [Unreleased]" in changelog else ["CHANGELOG.md has no section ## [Unreleased]"]
    wrong = []
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        wrong.append(f"version {version}: it must be X.Y.Z, or X.Y.ZrcN before a release")
    released = re.findall(r"^## \[(\d[^\]]*)\] - \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)
    if f"## [{version}]" not in changelog:
        wrong.append(f"CHANGELOG.md has no section ## [{version}]")
    if tag != f"v{version}":
        wrong.append(
            f"tag {tag}: the version is {version}, so it must be v{version}, and the tree without changes"
        )
    if released[:1] != [version]:
        wrong.append(f"CHANGELOG.md: the first release must be ## [{version}] with its date")
    if re.search(r"^## \[Unreleased\]\s+[^#\s]|^## \[Unreleased\]\s+###", changelog, re.MULTILINE):
        wrong.append("CHANGELOG.md: what is under Unreleased belongs to this release")
    return wrong


def tag_of_head() -> str | None:
    if os.environ.get("GITHUB_REF_TYPE") == "tag":
        return os.environ["GITHUB_REF_NAME"]
    command = ["git", "describe", "--exact-match", "--tags", "--match", "v*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def build(directory: Path) -> list[Path]:
    def hatchling(target: str, source: Path) -> None:
        command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(directory.resolve())]
        subprocess.run(command, cwd=source, check=True, stdout=subprocess.DEVNULL)

    hatchling("sdist", ROOT)
    [sdist] = directory.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as unpacked, tarfile.open(sdist) as tar:
        tar.extractall(unpacked, filter="data")
        [source] = Path(unpacked).iterdir()
        hatchling("wheel", source)
    [wheel] = directory.glob("*.whl")
    return [sdist, wheel]


def write_sbom(wheel: Path, file: Path, temporary: Path) -> int:
    """Writes what the wheel installs with all its extras, as CycloneDX; returns the number of components."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ",".join(extra for extra in project["optional-dependencies"] if extra not in TOOL_EXTRAS)
    venv.create(temporary, with_pip=True)
    python = temporary / "bin/python"
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", f"{wheel.resolve()}[{extras}]"], check=True)
    subprocess.run([temporary / "bin/prodisco-sandbox-mcp", "--help"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*pip, "uninstall", "--yes", "pip", "setuptools"], check=True, stderr=subprocess.DEVNULL)
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-file", str(file), str(python)]
    subprocess.run([*command, "--pyproject", str(ROOT / "pyproject.toml")], check=True)
    return len(json.loads(file.read_text())["components"])


def missing_builder() -> str | None:
    """Why docker cannot build the images for every platform; None where it can."""
    if shutil.which("docker") is None:
        return "docker is not installed"
    for command in ["version"], ["inspect", "--bootstrap"]:
        words = ["docker", "buildx", *command]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"docker buildx {command[0]}: {done.stderr.strip().splitlines()[0]}"
    if "docker-container" not in done.stdout:
        return "docker's builder makes no SBOM: docker buildx create --use"
    if missing := [platform for platform in PLATFORMS if platform not in done.stdout]:
        return f"docker's builder lacks {', '.join(missing)}: set up QEMU (tonistiigi/binfmt)"
    return None


def build_images(version: str, directory: Path) -> None:
    directory.mkdir()
    command = ["docker", "buildx", "build", "--platform", ",".join(PLATFORMS), "--sbom=true"]
    command += ["--provenance=mode=max", "--build-arg", f"VERSION={version}"]
    for target in TARGETS:
        output = f"type=oci,dest={directory / target}.tar"
        subprocess.run([*command, "--target", target, "--output", output, ROOT], check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(*sys.argv[1:] or [temporary, "dist"])
        for part in ("pypi", "sbom"):
            (directory / part).mkdir(parents=True)
        sdist, wheel = build(directory / "pypi")
        version = wheel.name.split("-")[1]
        tag = tag_of_head()
        if wrong := check_version(version, tag, (ROOT / "CHANGELOG.md").read_text()):
            raise SystemExit("\n".join(wrong))
        subprocess.run([sys.executable, "-m", "twine", "check", "--strict", sdist, wheel], check=True)
        subprocess.run([sys.executable, "-m", "check_wheel_contents", wheel], check=True)
        sbom = directory / f"sbom/prodisco_sandbox-{version}.cdx.json"
        components = write_sbom(wheel, sbom, Path(temporary, "venv"))
        print(f"{sbom.name}: {components} components")
        if reason := missing_builder():
            print(f"images not built: {reason}")
        else:
            build_images(version, directory / "images")
            print(f"images {', '.join(TARGETS)}: built for {', '.join(PLATFORMS)}, each with an SBOM")
        print(f"{sdist.name}, {wheel.name}: good{'' if tag else '; HEAD has no tag v*'}")


if __name__ == "__main__":
    main()
