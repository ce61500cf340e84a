"""What matplotlib shows is saved in the workspace, where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from prodisco_sandbox import ExecutionResult, SandboxClient
from tests.support.servers import Server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.science,
    pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"),
]

PNG = b"\x89PNG\r\n\x1a\n"
PLOT = "import matplotlib.pyplot as plt\nplt.plot([1, 2, 3])\n"


async def run(client: SandboxClient, code: str) -> ExecutionResult:
    result = await client.execute(code, timeout=120)
    assert result.success, result
    return result


async def clear(client: SandboxClient) -> None:
    for info in await client.files.list():
        await client.files.remove(info.path, recursive=True)


async def test_show_saves_a_picture_of_each_figure(server: Server, tmp_path: Path) -> None:
    async with SandboxClient(server.target) as client:
        await clear(client)
        started = await client.execute_async(
            f"{PLOT}plt.figure()\nplt.bar(['a'], [2])\nplt.show()\nprint(plt.get_fignums())\nplt.show()",
            timeout=120,
        )
        status = await client.wait_for_execution(started.execution_id)
        assert (status.output, status.error_output) == ("[]\n", "")
        made = await client.files.list(since_execution=started.execution_id, recursive=True)
        assert [info.path for info in made] == ["figure-1.png", "figure-2.png"]
        for info in made:
            assert (await client.files.read(info.path)).startswith(PNG)
        # Later pictures take nothing away, wherever the code has gone meanwhile.
        await run(client, f"import os; os.mkdir('d'); os.chdir('d')\n{PLOT}plt.gcf().show()")
        names = {info.path for info in await client.files.list(recursive=True) if info.path[0] != "."}
        assert names == {"d", "figure-1.png", "figure-2.png", "figure-3.png"}
        await clear(client)


@pytest.mark.parametrize(
    "code",
    [
        f"import matplotlib\nmatplotlib.use('agg')\n{PLOT}print(plt.get_backend())",
        f"import os\nos.environ['MPLBACKEND'] = 'agg'\n{PLOT}print(plt.get_backend())",
    ],
)
async def test_a_backend_of_the_codes_own_is_kept(server: Server, code: str) -> None:
    async with SandboxClient(server.target) as client:
        assert (await run(client, code)).output == "agg\n"
        await clear(client)


async def test_other_interpreters_inherit_nothing(server: Server) -> None:
    code = "import matplotlib.pyplot, os; print(os.environ.get('MPLBACKEND'), matplotlib.get_backend())"
    async with SandboxClient(server.target) as client:
        assert (await run(client, code)).output == "None module://prodisco_sandbox.server._matplotlib\n"
        await clear(client)
