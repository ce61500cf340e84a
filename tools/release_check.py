"""Builds what a release uploads and checks it: all of a release but the upload.

    python tools/release_check.py [DIRECTORY]

The sdist is built from the tree, the wheel from the sdist. Where HEAD has a tag, the tag, the version and
the changelog have to agree. With a DIRECTORY the files are left there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def check_version(version: str, tag: str | None, changelog: str) -> list[str]:
    """What is wrong with what is to be released; between releases there is no tag."""
    wrong = []
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        wrong.append(f"version {version}: it must be X.Y.Z, or X.Y.ZrcN before a release")
    released = re.findall(r"^## \[(\d[^\]]*)\] - \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)
    if f"## [{version}]" not in changelog:
        wrong.append(f"CHANGELOG.md has no section ## [{version}]")
    if tag is not None:
        if tag != f"v{version}":
            wrong.append(f"tag {tag}: pyproject.toml has the version {version}, so it must be v{version}")
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


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(*sys.argv[1:] or [temporary])
        directory.mkdir(parents=True, exist_ok=True)
        version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
        tag = tag_of_head()
        if wrong := check_version(version, tag, (ROOT / "CHANGELOG.md").read_text()):
            raise SystemExit("\n".join(wrong))
        sdist, wheel = build(directory)
        subprocess.run([sys.executable, "-m", "twine", "check", "--strict", sdist, wheel], check=True)
        subprocess.run([sys.executable, "-m", "check_wheel_contents", wheel], check=True)
        print(f"{sdist.name}, {wheel.name}: good{'' if tag else '; HEAD has no tag v*'}")


if __name__ == "__main__":
    main()
