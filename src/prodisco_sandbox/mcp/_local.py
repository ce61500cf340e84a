"""How the servers of ``--local`` are configured: by options, and by the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from ..local import OWN_OPTIONS, PASSED
from ..server._options import SETTINGS, OptionsError, parse

_SETTINGS = {setting.name: setting for setting in SETTINGS if f"--{setting.name}" not in OWN_OPTIONS}


def server_settings(options: Sequence[str], environ: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Reads what ``--server-option`` and the server's own variables say; an option beats a variable.

    Variables for settings that the cluster itself decides, such as SANDBOX_TCP_PORT, are ignored:
    they may be meant for another program.

    Args:
        options: As they were given: ``--memory-limit-mb=512``, with or without the dashes.
        environ: The environment.

    Returns:
        Arguments of the servers, and the names of the variables that they inherit.

    Raises:
        ValueError: The server has no such option, it is not the caller's to set, or its value is
            wrong; the message names it.
    """
    arguments: list[str] = []
    lacks_value = False
    for text in options:
        if lacks_value:
            arguments.append(text)
            lacks_value = False
            continue
        option = text if text.startswith("-") else f"--{text}"
        name = option.partition("=")[0]
        if name in OWN_OPTIONS:
            raise ValueError(f"--server-option={text}: the program itself sets {name}")
        if name.removeprefix("--") not in _SETTINGS or not name.startswith("--"):
            known = ", ".join(f"--{known}" for known in _SETTINGS)
            raise ValueError(
                f"--server-option={text}: the sandbox server has no option {name}; it has {known}"
            )
        arguments.append(option)
        lacks_value = "=" not in option
    variables = {
        setting.variable: environ[setting.variable]
        for setting in _SETTINGS.values()
        if environ.get(setting.variable)
    }
    try:
        read = parse(arguments, variables)
    except OptionsError as error:
        where = "" if any(name in str(error) for name in variables) else "--server-option: "
        raise ValueError(f"{where}{error}") from None
    if read.writable:
        # Servers have working directories of their own.
        arguments.append(f"--writable={os.pathsep.join(map(str, read.writable))}")
    return arguments, [*PASSED, *variables, *read.pass_env]
