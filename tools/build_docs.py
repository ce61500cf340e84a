"""Builds the documentation site, and checks every link inside it.

    python tools/build_docs.py DIRECTORY

The pages are those of docs/, README.md and its neighbours, and a reference that is generated from the
public names. A link that is good on GitHub is good on the site: to another page where there is one, else
its text is all that is left. Diagrams become pictures, so that the site loads nothing from elsewhere.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]

PAGES = {
    "README.md": "overview.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""Pages that are not in docs/, and their names on the site."""

MODULES = ("testing", "local", "mcp")
"""Those that have public names of their own beside the package's, each on a page of its own."""
TITLES = {
    "manager": "Manager",
    "config": "Settings",
    "client": "Client",
    "results": "Results",
    "errors": "Errors",
    "testing": "Doubles for tests: prodisco_sandbox.testing",
    "local": "Without a cluster: prodisco_sandbox.local",
    "mcp": "MCP tool: prodisco_sandbox.mcp",
}
FOREIGN = "object, int, str, BaseException, Exception, OSError, Generic"
"""Classes whose members are not the library's own."""

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])+)\]\(([^)\s]+)\)")


def public_names() -> dict[str, list[str]]:
    """The public names of the library by page, each with its module: ``prodisco_sandbox.SandboxManager``."""
    package = importlib.import_module("prodisco_sandbox")
    pages: dict[str, list[str]] = {page: [] for page in TITLES}
    for name in package.__all__:
        page = package._HOMES.get(name) or ("errors" if name.endswith("Error") else "results")
        pages[page].append(f"{package.__name__}.{name}")
    pages["errors"].sort(key=lambda name: not name.endswith(".SandboxError"))  # the root has the tree
    for page in MODULES:
        module = importlib.import_module(f"{package.__name__}.{page}")
        pages[page] = [f"{module.__name__}.{name}" for name in module.__all__]
    return pages


def public_members(name: str) -> Iterator[str]:
    """The methods, properties and fields that a public name has and that need a description."""
    module, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    if not isinstance(value, type):
        return
    for kind in value.__mro__:
        if kind.__module__.startswith("prodisco_sandbox"):
            for member in {**vars(kind), **vars(kind).get("__annotations__", {})}:
                if not member.startswith("_"):
                    yield f"{name}.{member}"


def reference(page: str, names: list[str]) -> str:
    lines = [TITLES[page], "=" * len(TITLES[page]), ""]
    for name in names:
        module, _, attribute = name.rpartition(".")
        value = getattr(importlib.import_module(module), attribute)
        if isinstance(value, type):
            lines += [f".. autoclass:: {name}", "   :members:", f"   :inherited-members: {FOREIGN}"]
            lines += ["   :undoc-members:", *["   :show-inheritance:"] * (page == "errors"), ""]
        else:
            lines += [f".. auto{'function' if inspect.isroutine(value) else 'data'}:: {name}", ""]
    return "\n".join(lines)


def on_site(text: str, path: Path, picture: Callable[[str], str]) -> str:
    """The text of a page, with links as they have to be on the site."""

    def link(match: re.Match[str]) -> str:
        bang, label, target = match.groups()
        label = LINK.sub(link, label)
        file, hash_, anchor = target.partition("#")
        if not file or urlsplit(target).scheme:
            return f"{bang}[{label}]({target})"
        found = (path.parent / file).resolve()
        if not found.exists():
            raise SystemExit(f"{path.relative_to(ROOT)}: {target} does not exist")
        inside = found.relative_to(ROOT).as_posix()
        page = PAGES.get(inside) or (inside.removeprefix("docs/") if inside.startswith("docs/") else None)
        if page is None or found.suffix not in (".md", ".svg"):
            return label
        here = PAGES.get(path.relative_to(ROOT).as_posix()) or path.relative_to(ROOT / "docs").as_posix()
        return f"{bang}[{label}]({os.path.relpath(page, Path(here).parent)}{hash_}{anchor})"

    parts = re.split(r"(^ *```.*?^ *```$)", text, flags=re.MULTILINE | re.DOTALL)
    for number, part in enumerate(parts):
        if part.startswith("```mermaid"):
            parts[number] = picture(part.removeprefix("```mermaid\n").removesuffix("```"))
        elif number % 2 == 0:
            parts[number] = LINK.sub(link, part)
    return "".join(parts)


def write_pages(source: Path) -> None:
    from mermaid_render import mermaid_to_svg  # type: ignore[import-not-found, unused-ignore]

    shutil.copytree(ROOT / "docs", source)
    drawn = 0

    def picture(diagram: str) -> str:
        nonlocal drawn
        drawn += 1
        (source / f"diagram-{drawn}.svg").write_bytes(mermaid_to_svg(diagram))
        return f"![diagram](/diagram-{drawn}.svg)\n"

    for page in sorted(source.rglob("*.md")):
        path = ROOT / "docs" / page.relative_to(source)
        page.write_text(on_site(path.read_text(), path, picture))
    for name, page_name in PAGES.items():
        (source / page_name).write_text(on_site((ROOT / name).read_text(), ROOT / name, picture))
    (source / "reference").mkdir()
    for page_name, names in public_names().items():
        (source / "reference" / f"{page_name}.rst").write_text(reference(page_name, names))


class _Page(HTMLParser):
    """The anchors and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def check_links(site: Path) -> int:
    """Checks that the target of each link inside the site is there; returns how many there are."""
    pages = {path.resolve(): _Page(path.read_text()) for path in site.rglob("*.html")}
    checked, broken = 0, []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            checked += 1
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append(f"{path.relative_to(site.resolve())}: {link}")
    if broken:
        raise SystemExit("links that lead nowhere:\n" + "\n".join(broken))
    return checked


def check_pages_of_errors(site: Path, names: Iterable[str]) -> None:
    """Checks that the page that each error names has a section for it."""
    for name in names:
        [note] = getattr(importlib.import_module("prodisco_sandbox"), name)("no slot").__notes__
        found = re.search(r"docs/(\S+)\.md#(\S+)", note)
        if found is None or found[2] not in _Page((site / f"{found[1]}.html").read_text()).anchors:
            raise SystemExit(f"{name}: the site does not have what its note names: {note}")


def undocumented(site: Path, names: Iterable[str]) -> list[str]:
    """Those of the names that are not in the site's index."""
    from sphinx.util.inventory import InventoryFile  # type: ignore[import-not-found, unused-ignore]

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    documented = {name for kind in inventory.data for name in inventory.data[kind]}
    return [name for name in names if name not in documented]


def main() -> None:
    [directory] = map(Path, sys.argv[1:])
    shutil.rmtree(directory, ignore_errors=True)
    source, site = directory / "source", directory / "html"
    write_pages(source)
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        str(source),
        str(site),
    ]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit("the documentation has warnings")
    names = [name for names in public_names().values() for name in names]
    members = sorted({member for name in names for member in public_members(name)})
    if missing := undocumented(site, [*names, *members]):
        raise SystemExit("not in the reference:\n" + "\n".join(missing))
    check_pages_of_errors(site, [name.rpartition(".")[2] for name in public_names()["errors"]])
    links = check_links(site)
    print(f"{site}: {len(names)} public names, {len(members)} members of theirs, {links} links checked")


if __name__ == "__main__":
    main()
