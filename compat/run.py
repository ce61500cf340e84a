"""Runs MCP clients, each in an environment of its own, against the program: stdio and HTTP.

``make compat`` runs this. It installs the newest version of each client from the package registries, and
prints a table; the exit status is 1 where a step has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
STEPS = ("initialise", "list", "execute", "progress", "status", "cancel", "parallel", "close", "end")
PYTHON = {
    "sdk1": ("sdk1.py", "mcp>=1.9,<2"),
    "sdk2": ("sdk2.py", "mcp>=2.3,<3"),
    "fastmcp": ("fast.py", "fastmcp"),
    "openai-agents": ("openai_agents.py", "openai-agents"),
    "langchain": ("langchain_adapters.py", "langchain-mcp-adapters"),
    "pydantic-ai": ("pydantic_agents.py", "pydantic-ai-slim[mcp]"),
    "google-adk": ("adk.py", "google-adk[mcp]"),
}
NODE = {
    "ts1": (["ts.mjs", "1"], "@modelcontextprotocol/sdk@1"),
    "ts2": (["ts.mjs", "2"], "@modelcontextprotocol/client@2"),
    "inspector": (["inspector.mjs"], "@modelcontextprotocol/inspector"),
}
SHOWN = {"mcp", "fastmcp", "openai-agents", "langchain-mcp-adapters", "pydantic-ai-slim", "google-adk"}
TIMEOUT = 180


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envs", type=Path, default=Path(".venv-compat"), help="where environments are made")
    parser.add_argument(
        "client", nargs="*", help=f"which ones; default: all of {', '.join((*PYTHON, *NODE))}"
    )
    args = parser.parse_args()
    command = [sys.executable, "-m", "prodisco_sandbox.mcp", "--local", "--log-level", "error"]
    failed = False
    print(f"| client | over | {' | '.join(STEPS)} |")
    print("| --- " * (len(STEPS) + 2) + "|")
    for name in args.client or (*PYTHON, *NODE):
        directory = (args.envs / name).absolute()
        version = install(name, directory)
        for transport in ("stdio", "http"):
            found = run(name, directory, command, http=transport == "http")
            steps = [found.get(step, "FAILED") for step in STEPS]
            failed |= "FAILED" in steps
            print(f"| {version} | {transport} | {' | '.join(steps)} |", flush=True)
    return int(failed)


def install(name: str, directory: Path) -> str:
    """Makes an environment unless it is there; returns the client's name and version."""
    if name in PYTHON:
        python = directory / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", directory], check=True)
            pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, PYTHON[name][1]], check=True)
        listed = subprocess.run(
            [python, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"],
            check=True,
            stdout=subprocess.PIPE,
        )
        found = {each["name"].lower(): each["version"] for each in json.loads(listed.stdout)}
        return ", ".join(
            f"{each} {found[each]}" for each in sorted(SHOWN & found.keys(), key=lambda e: e == "mcp")
        )
    package = NODE[name][1]
    plain = "@" + package.removeprefix("@").partition("@")[0]
    manifest = directory / "node_modules" / plain / "package.json"
    if not manifest.exists():
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "package.json").write_text('{"private": true}')
        subprocess.run(
            ["npm", "install", "--silent", "--no-audit", "--no-fund", package], cwd=directory, check=True
        )
    return f"{plain} {json.loads(manifest.read_text())['version']}"


def run(name: str, directory: Path, command: list[str], *, http: bool) -> dict[str, str]:
    """What became of each step."""
    environ = {**os.environ, "COMPAT_COMMAND": json.dumps(command)}
    server = None
    if http:
        server = subprocess.Popen(
            [*command, "--transport", "http", "--port", "0", "--log-level", "info"],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert server.stderr is not None
        for line in server.stderr:
            if "listening on " in line:
                environ["COMPAT_URL"] = line.rpartition("listening on ")[2].strip()
                break
    if name in PYTHON:
        argv = [str(directory / "bin" / "python"), str(HERE / "clients" / PYTHON[name][0])]
    else:
        script, *rest = NODE[name][0]
        argv = ["node", str(HERE / "clients" / script), *rest]
    try:
        done = subprocess.run(
            argv,
            check=False,
            cwd=directory,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired as late:
        print(late.stderr, file=sys.stderr)
        return {}
    finally:
        if server is not None:
            for _ in range(2):
                server.send_signal(signal.SIGTERM)
            server.communicate(timeout=60)
    lines = done.stdout.strip().splitlines()
    found: dict[str, str] = json.loads(lines[-1]) if lines else {}
    if set(STEPS) - {step for step, how in found.items() if how != "FAILED"}:
        print(f"{name}, {'http' if http else 'stdio'}:\n{done.stderr[-4000:]}", file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main())
