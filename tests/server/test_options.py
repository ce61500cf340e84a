"""The command line and the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from prodisco_sandbox.server._options import SETTINGS, OptionsError, parse
from tests.support import ROOT


def test_defaults() -> None:
    options = parse([], {})
    assert options.host is None
    assert options.port == 50051
    assert options.socket == Path("/tmp/prodisco-sandbox.sock")
    assert options.cache_dir == Path("/tmp/prodisco-scripts")
    assert options.workspace is None
    assert options.transport_mode == "insecure"
    assert options.isolation == "process"
    assert not options.exit_with_parent
    assert options.zygote
    assert options.preload is None
    assert options.writable == ()
    assert options.pass_env == ()
    assert options.memory_limit is None
    assert (options.max_concurrent, options.max_queued, options.max_processes) == (8, 64, 64)


@pytest.mark.parametrize(
    ("argv", "environ", "host"),
    [
        ([], {"SANDBOX_USE_TCP": "true"}, "0.0.0.0"),
        ([], {"SANDBOX_USE_TCP": "1", "SANDBOX_TCP_HOST": "::"}, "::"),
        ([], {"SANDBOX_USE_TCP": "false"}, None),
        ([], {"SANDBOX_TCP_PORT": "1234"}, "0.0.0.0"),
        ([], {"SANDBOX_TCP_HOST": "127.0.0.1"}, "127.0.0.1"),
        ([], {"SANDBOX_TCP_HOST": "", "SANDBOX_TCP_PORT": ""}, None),
        (["--port", "0"], {}, "0.0.0.0"),
        (["--host", "::1"], {"SANDBOX_TCP_HOST": "127.0.0.1"}, "::1"),
        (["--port", "1"], {"SANDBOX_SOCKET_PATH": "/x/s"}, "0.0.0.0"),
        (["--socket", "/x/s"], {"SANDBOX_TCP_PORT": "1234", "SANDBOX_USE_TCP": "true"}, None),
    ],
)
def test_a_host_or_port_selects_tcp_and_options_beat_the_environment(
    argv: list[str], environ: dict[str, str], host: str | None
) -> None:
    assert parse(argv, environ).host == host


def test_nothing_is_preloaded_where_nothing_is_named() -> None:
    assert parse(["--preload", ""], {}).preload == ()
    assert not parse(["--no-zygote"], {}).zygote
    assert parse(["--no-zygote", "--zygote"], {}).zygote


def test_every_setting_is_read_from_both_places() -> None:
    values = {"transport-mode": ("insecure", "insecure"), "isolation": ("bwrap", "process")}
    values["preload"] = ("json", "json,email.message")
    for setting in SETTINGS:
        other, given = values.get(setting.name, ("33", "34"))
        field = setting.name.replace("-", "_").removesuffix("_mb")
        from_env = getattr(parse([], {setting.variable: other}), field)
        from_both = getattr(parse([f"--{setting.name}", given], {setting.variable: other}), field)
        assert from_env == setting.read(other)
        assert from_both == setting.read(given)


@pytest.mark.parametrize(
    ("argv", "environ", "message"),
    [
        (["--port", "65536"], {}, "--port is '65536': it must be an integer from 0 to 65535"),
        ([], {"SANDBOX_TCP_PORT": "http"}, "SANDBOX_TCP_PORT is 'http'"),
        ([], {"SANDBOX_TRANSPORT_MODE": "TLS"}, "SANDBOX_TRANSPORT_MODE is 'TLS': use one of insecure"),
        ([], {"SANDBOX_USE_TCP": "yes"}, "SANDBOX_USE_TCP is 'yes'"),
        (["--socket", "/s", "--port", "1"], {}, "--socket and --port exclude each other"),
        (["--isolation", "vm"], {}, "--isolation is 'vm'"),
        (["--preload", "json,a b"], {}, "--preload is 'json,a b': 'a b' is not the name of a module"),
        (["--host", ""], {}, "--host is '': it must not be empty"),
        (["--grace-period", "nan"], {}, "--grace-period is 'nan'"),
        (["--pod-name", "Not a pod"], {}, "--pod-name is 'Not a pod': it must be the name of a pod"),
        (["--max-concurrent", "0"], {}, "--max-concurrent is '0'"),
        (["--frob=1"], {}, "unrecognized arguments: --frob=1"),
        (["--max-concurrent"], {}, "--max-concurrent: expected one argument"),
        (["--transport-mode", "tls"], {}, "--tls-cert (SANDBOX_TLS_CERT_PATH) is not set"),
        (
            ["--transport-mode", "tls", "--tls-cert", "/nowhere.pem", "--tls-key", "/nowhere.pem"],
            {},
            "--tls-cert (SANDBOX_TLS_CERT_PATH) is '/nowhere.pem': there is no such file",
        ),
    ],
)
def test_what_is_wrong_is_named(argv: list[str], environ: dict[str, str], message: str) -> None:
    with pytest.raises(OptionsError) as caught:
        parse(argv, environ)
    assert message in str(caught.value)


def test_mtls_needs_authorities(tmp_path: Path) -> None:
    file = tmp_path / "file.pem"
    file.touch()
    argv = ["--transport-mode", "mtls", "--tls-cert", str(file), "--tls-key", str(file)]
    with pytest.raises(OptionsError, match=r"--tls-ca \(SANDBOX_TLS_CA_PATH\) is not set"):
        parse(argv, {})


def test_lists() -> None:
    options = parse(["--writable", "/a:/b", "--pass-env", "A, B,"], {})
    assert options.writable == (Path("/a"), Path("/b"))
    assert options.pass_env == ("A", "B")


def test_the_documentation_lists_every_setting_with_its_default() -> None:
    text = (ROOT / "docs/server.md").read_text()
    for setting in SETTINGS:
        row = next(line for line in text.splitlines() if line.startswith(f"| `--{setting.name}`"))
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[2] == f"`{setting.variable}`"
        assert cells[3] == (f"`{setting.default}`" if setting.default else cells[3])
