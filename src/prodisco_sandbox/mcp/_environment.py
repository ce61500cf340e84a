"""What a sandbox has, for the model: which Python, which packages, whether there is a network."""

from __future__ import annotations

import json
from collections.abc import Callable

from .._log import get_logger
from ..client import SandboxClient
from ..errors import SandboxError

log = get_logger("mcp")

TIMEOUT = 5.0
"""How long a sandbox may take to answer, in seconds."""
MOST_TRIES = 3

NOTABLE = (
    "numpy", "pandas", "polars", "pyarrow", "scipy", "scikit-learn", "statsmodels", "sympy", "networkx",
    "matplotlib", "seaborn", "plotly", "pillow", "opencv-python", "torch", "tensorflow", "jax",
    "transformers", "requests", "httpx", "aiohttp", "beautifulsoup4", "lxml", "openpyxl", "pypdf",
    "python-docx", "sqlalchemy", "duckdb", "pyyaml", "pydantic", "pytest",
)  # fmt: skip

MARK = "# What does this sandbox have?"
"""How the code begins that the model has not sent."""

# A default route is no proof of a network, but without one there is none. Nothing is sent.
_CODE = f"""\
{MARK}
import importlib.metadata, importlib.util, json, pathlib, platform
names = {{(d.metadata["Name"] or "").lower() for d in importlib.metadata.distributions()}}
try:
    routes = [line.split() for line in pathlib.Path("/proc/net/route").read_text().splitlines()[1:]]
    network = any(route[1] == "00000000" for route in routes)
except OSError:
    network = None
print(json.dumps({{
    "python": platform.python_version(),
    "packages": [name for name in {NOTABLE!r} if name in names],
    "network": network,
    "pip": importlib.util.find_spec("pip") is not None,
}}))
"""


class Environment:
    """Asks the first sandbox, once; all sandboxes of a server are alike.

    Args:
        publish: Takes the answer, a text for the model.
    """

    def __init__(self, publish: Callable[[str], object]) -> None:
        self._publish = publish
        self._tries = 0

    async def learn(self, client: SandboxClient) -> str | None:
        """Asks this sandbox, unless another one has answered or is being asked; returns what is new.

        Safe to cancel: then it is not asked again.
        """
        if self._tries >= MOST_TRIES:
            return None
        tries, self._tries = self._tries, MOST_TRIES
        try:
            result = await client.execute(_CODE, timeout=TIMEOUT)
            text = _sentence(json.loads(result.output))
        except (SandboxError, ValueError, LookupError, TypeError) as error:
            self._tries = tries + 1
            log.info("environment_unknown", error=str(error))
            return None
        self._publish(text)
        return text


def _sentence(found: dict[str, object]) -> str:
    packages = found["packages"]
    if not isinstance(packages, list):
        raise TypeError(packages)
    with_them = f" with {', '.join(map(str, packages))}" if packages else ""
    text = f"Sandboxes have Python {found['python']}{with_them}; importlib.metadata lists all packages."
    if found["network"] is False:
        return f"{text} They have no network, so nothing can be installed."
    if not found["pip"]:
        return f"{text} Nothing can be installed with pip."
    return (
        f"{text} If there is a network, `python -m pip install --target . NAME` in a subprocess installs a"
        " package for later executions."
    )
