from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import pytest

from prodisco_sandbox import SandboxClient, SandboxManager, SandboxManagerConfig, TlsConfig


def multi(**settings: Any) -> SandboxManagerConfig:
    return SandboxManagerConfig(**{"mode": "multi", **settings})


def test_defaults() -> None:
    config = multi()
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    instance_id = values.pop("instance_id")
    assert values == {
        "mode": "multi",
        "single_client": None,
        "single_target": None,
        "namespace": "prodisco",
        "sandbox_port": 50051,
        "sandbox_image": "prodisco/sandbox-server:latest",
        "pod_template_spec": None,
        "warm_pool": None,
        "ready_timeout": 120.0,
        "ready_poll_interval": 1.0,
        "session_idle_timeout": 600.0,
        "on_idle": "delete",
        "suspended_for": 86_400.0,
        "max_suspended": None,
        "workspace_storage": None,
        "workspace_storage_class": None,
        "idle_check_interval": 60.0,
        "max_sessions": 10,
        "capacity_timeout": 0.0,
        "when_full": "refuse",
        "evict_after": 30.0,
        "api_version": "auto",
        "endpoint": "auto",
        "tls": None,
        "managed_by": "mcp-server",
        "lease_duration": 1800.0,
        "shutdown_timeout": 30.0,
        "shared": False,
        "clock_skew": 30.0,
    }
    assert len(bytes.fromhex(instance_id)) == 8
    assert multi().instance_id != instance_id, "another incarnation must not own this one's Sandboxes"


def test_mode_has_no_default() -> None:
    with pytest.raises(TypeError, match="mode"):
        SandboxManagerConfig()  # type: ignore[call-arg]


def test_is_frozen_and_keyword_only() -> None:
    config: Any = multi()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_sessions = 3
    with pytest.raises(TypeError):
        SandboxManagerConfig("multi")  # type: ignore[call-arg]


SECONDS = "a finite number of seconds above 0"
NO_SECONDS: tuple[object, ...] = (0, 0.0, -1, math.nan, math.inf, -math.inf, "60", True, [])
BAD: list[tuple[str, str, tuple[object, ...]]] = [
    ("mode", '"single" or "multi"', ("Multi", "", None, [])),
    (
        "namespace",
        "an RFC 1123 label such as 'prodisco'",
        ("", "Prodisco", "-a", "a-", "a.b", "a" * 64, "a\n", "ü", None, 7),
    ),
    ("sandbox_port", "an integer from 1 to 65535", (0, -1, 65536, "50051", 50051.0, True, None)),
    ("sandbox_image", "an image reference without white space", ("", " ", "an image", "image\n", None, 7)),
    (
        "pod_template_spec",
        'a pod template: a dict with a "spec" dict',
        ({}, {"spec": None}, {"containers": []}, "spec", []),
    ),
    ("warm_pool", "the name of a SandboxWarmPool, or None", ("", "Python", "a.b", "-a", "a" * 64, 7)),
    ("ready_timeout", SECONDS, (*NO_SECONDS, None)),
    ("ready_poll_interval", SECONDS, (*NO_SECONDS, None)),
    ("session_idle_timeout", SECONDS, (*NO_SECONDS, None)),
    ("idle_check_interval", SECONDS, (*NO_SECONDS, None)),
    ("shutdown_timeout", SECONDS, (*NO_SECONDS, None)),
    ("lease_duration", SECONDS, NO_SECONDS),
    (
        "capacity_timeout",
        "a finite number of seconds of at least 0",
        (-0.001, math.nan, math.inf, "0", False, None),
    ),
    ("when_full", '"refuse" or "evict"', ("Evict", "", None, True, [])),
    ("evict_after", SECONDS, (*NO_SECONDS, None)),
    ("max_sessions", "an integer of at least 1", (0, -1, 1.0, "10", True, None)),
    ("max_suspended", "an integer of at least 1", (0, -1, 1.0, "10", True)),
    ("suspended_for", SECONDS, (*NO_SECONDS, None)),
    ("on_idle", '"delete" or "suspend"', ("keep", "", None, True, [])),
    (
        "workspace_storage",
        "a quantity such as '1Gi', or None",
        ("", "0", "0Gi", "1 Gi", "-1Gi", "1gb", "Gi", "1Gi\n", 7),
    ),
    ("workspace_storage_class", "the name of a StorageClass, or None", ("", "A", "a b", "-a", "a." * 130, 7)),
    ("api_version", '"auto", "v1alpha1" or "v1beta1"', ("v1", "agents.x-k8s.io/v1beta1", "", None, {})),
    ("endpoint", '"auto", "pod-ip", "service" or a callable', ("podIP", "", None, 7, {})),
    ("tls", "a TlsConfig or None", (True, "mtls", {"ca": "ca.pem"})),
    ("instance_id", "a non-empty string", ("", None, 7)),
    (
        "managed_by",
        "a label value such as 'mcp-server'",
        ("", None, 7, "a b", "-a", "a-", "a=b", "a,b", "x" * 64, "\u00e4"),
    ),
]


@pytest.mark.parametrize(("field", "right", "values"), BAD, ids=[field for field, *_ in BAD])
def test_bad_value_names_field_value_and_what_is_right(
    field: str, right: str, values: tuple[object, ...]
) -> None:
    for value in values:
        with pytest.raises(ValueError) as caught:
            multi(**{field: value})
        assert str(caught.value) == f"{field} is {value!r}: it must be {right}"


def test_a_number_too_large_for_a_float_is_no_number_of_seconds() -> None:
    with pytest.raises(ValueError, match=rf"^ready_timeout is 10{{400}}: it must be {SECONDS}$"):
        multi(ready_timeout=10**400)


def test_pod_template_with_a_strange_key_is_named() -> None:
    with pytest.raises(ValueError, match="pod_template_spec has the key 'kind': a pod template has metadata"):
        multi(pod_template_spec={"spec": {}, "kind": "PodTemplate"})


@pytest.mark.parametrize("metadata", [["labels"], {"labels": ["app"]}])
def test_pod_template_with_bad_metadata_is_named(metadata: object) -> None:
    with pytest.raises(
        ValueError, match=r"pod_template_spec\.metadata is .*: it must be a dict whose labels"
    ):
        multi(pod_template_spec={"spec": {}, "metadata": metadata})


@pytest.mark.parametrize(
    "settings",
    [
        {"namespace": "a"},
        {"namespace": "0" * 63},
        {"sandbox_port": 1},
        {"sandbox_port": 65535},
        {"capacity_timeout": 0},
        {"max_sessions": 1},
        {"ready_timeout": 1},
        {"lease_duration": None},
        {"pod_template_spec": {"spec": {}, "metadata": None}},
        {"pod_template_spec": {"spec": {}, "metadata": {"labels": None}}},
        {"endpoint": lambda sandbox: None},
        {"sandbox_image": "registry.example/team/image@sha256:0123"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_edges_of_the_ranges_are_inside(settings: dict[str, Any]) -> None:
    config = multi(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


# Instance labels


@pytest.mark.parametrize("instance_id", ["a", "Team-1_b.c", "x" * 63, "0"])
def test_valid_label_value_is_its_own_instance_label(instance_id: str) -> None:
    assert multi(instance_id=instance_id).instance_label == instance_id


def test_other_instance_ids_are_hashed_into_labels_of_their_own() -> None:
    ids = ["x" * 64, "-a", "a-", "a b", "a/b", "ü", "a\n", "\ud800", "_"]
    labels = [multi(instance_id=instance_id).instance_label for instance_id in ids]
    assert all(len(label) == 40 and set(label) <= set("0123456789abcdef") for label in labels)
    assert len(set(labels)) == len(ids)


# TLS


@pytest.mark.parametrize("field", ["ca", "cert", "key"])
@pytest.mark.parametrize("value", ["", 7, b"ca.pem", ["ca.pem"]], ids=repr)
def test_tls_path_that_is_none_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        TlsConfig(**{"cert": "c.pem", "key": "k.pem", field: value})
    assert str(caught.value) == f"TlsConfig.{field} is {value!r}: give the path of a PEM file, or None"


@pytest.mark.parametrize("field", ["server_name", "secret_name"])
@pytest.mark.parametrize("value", ["", 7, b"name"], ids=repr)
def test_tls_name_that_is_none_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        TlsConfig(**{field: value})
    assert str(caught.value) == f"TlsConfig.{field} is {value!r}: give a non-empty string, or None"


@pytest.mark.parametrize(("given", "missing"), [("cert", "key"), ("key", "cert")])
def test_half_a_client_certificate_is_refused(given: str, missing: str) -> None:
    paths: dict[str, Any] = {given: "file.pem"}
    with pytest.raises(ValueError, match=rf"^TlsConfig\.{missing} is None: .* both cert and key$"):
        TlsConfig(**paths)


SUSPEND: dict[str, Any] = {"on_idle": "suspend", "workspace_storage": "1Gi"}


@pytest.mark.parametrize("size", ["1Gi", "500Mi", "1.5T", "1000000000", "100m"])
def test_sizes_of_a_workspace(size: str) -> None:
    assert multi(workspace_storage=size, workspace_storage_class="fast.example").workspace_storage == size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            SUSPEND | {"workspace_storage": None},
            "workspace_storage is None: with on_idle 'suspend' the default",
        ),
        (
            SUSPEND | {"api_version": "v1alpha1"},
            "on_idle is 'suspend': it must be \"delete\" with api_version",
        ),
        ({"workspace_storage_class": "fast"}, "workspace_storage_class is 'fast': it must be None without"),
        ({"warm_pool": "a", "workspace_storage": "1Gi"}, "workspace_storage is '1Gi': it must be None: the"),
        (
            {"warm_pool": "a", "on_idle": "suspend"},
            "on_idle is 'suspend': it must be \"delete\" with warm_pool: a member",
        ),
    ],
)
def test_what_suspension_needs(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        multi(**settings)
    assert str(caught.value).startswith(message)


def test_a_template_of_ones_own_may_be_suspended_without_a_workspace() -> None:
    assert multi(on_idle="suspend", pod_template_spec={"spec": {}}).on_idle == "suspend"


def test_how_many_may_be_suspended() -> None:
    assert multi(max_sessions=7).most_suspended == 70
    assert multi(max_sessions=7, max_suspended=3).most_suspended == 3


def test_whether_an_instance_comes_back() -> None:
    config = multi()
    assert config.has_random_instance_id
    assert dataclasses.replace(config, max_sessions=2).has_random_instance_id
    assert not multi(instance_id=str(config.instance_id)).has_random_instance_id


TEMPLATE = "the SandboxTemplate of warm_pool says that"


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("pod_template_spec", {"spec": {}}, f"None: {TEMPLATE}"),
        ("sandbox_image", "other", f"left out: {TEMPLATE}"),
        ("tls", TlsConfig(server_name="a", secret_name="b"), f"None: {TEMPLATE}"),
        (
            "tls",
            TlsConfig(),
            "the name in the servers' certificate: a sandbox of a warm_pool has no name of its own",
        ),
        ("endpoint", "service", '"pod-ip": a SandboxClaim names no Service'),
        ("api_version", "v1alpha1", '"auto" or "v1beta1", the only one that has claims'),
    ],
)
def test_what_a_warm_pool_excludes(field: str, value: Any, right: str) -> None:
    with pytest.raises(ValueError) as caught:
        multi(warm_pool="python", **{field: value})
    text = str(caught.value)
    assert text.startswith(field)
    assert text.endswith(f": it must be {right}")
    SandboxManagerConfig(mode="single", warm_pool="python", **{field: value})  # where no claim is made


def test_a_warm_pool_with_tls_needs_no_secret_here() -> None:
    config = multi(warm_pool="a" * 63, tls=TlsConfig(server_name="sandbox"), endpoint="pod-ip")
    assert config.warm_pool == "a" * 63


def test_tls_mode() -> None:
    assert TlsConfig(ca=Path("ca.pem")).mode == "tls"
    assert TlsConfig(cert="c.pem", key="k.pem").mode == "mtls"


def test_default_pod_template_with_tls_needs_a_secret() -> None:
    with pytest.raises(ValueError, match=r"^tls\.secret_name is None: .* pod_template_spec"):
        multi(tls=TlsConfig())
    multi(tls=TlsConfig(secret_name="sandbox-tls"))
    multi(tls=TlsConfig(), pod_template_spec={"spec": {}})
    SandboxManagerConfig(mode="single", tls=TlsConfig())


MTLS = {
    "SANDBOX_TRANSPORT_MODE": "mtls",
    "SANDBOX_TLS_CA_PATH": "/tls/ca.crt",
    "SANDBOX_TLS_CLIENT_CERT_PATH": "/tls/tls.crt",
    "SANDBOX_TLS_CLIENT_KEY_PATH": "/tls/tls.key",
    "SANDBOX_TLS_SERVER_NAME": "sandbox",
    "SANDBOX_TLS_SECRET_NAME": "sandbox-tls",
}


def test_tls_from_env() -> None:
    assert TlsConfig.from_env(MTLS) == TlsConfig(
        ca="/tls/ca.crt",
        cert="/tls/tls.crt",
        key="/tls/tls.key",
        server_name="sandbox",
        secret_name="sandbox-tls",
    )
    # Plain TLS shows no certificate, also where one lies ready.
    assert TlsConfig.from_env(MTLS | {"SANDBOX_TRANSPORT_MODE": "tls"}) == TlsConfig(
        ca="/tls/ca.crt", server_name="sandbox", secret_name="sandbox-tls"
    )
    assert TlsConfig.from_env({"SANDBOX_TRANSPORT_MODE": "tls", "SANDBOX_TLS_CA_PATH": ""}) == TlsConfig()
    assert TlsConfig.from_env(MTLS | {"SANDBOX_TRANSPORT_MODE": ""}) is None
    assert TlsConfig.from_env({}) is None


def test_tls_from_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TlsConfig.from_env() is None
    monkeypatch.setenv("SANDBOX_TRANSPORT_MODE", "tls")
    assert TlsConfig.from_env() == TlsConfig()


@pytest.mark.parametrize("mode", ["TLS", "ssl", "plaintext", " mtls"])
def test_unknown_transport_mode_is_never_taken_for_insecure(mode: str) -> None:
    with pytest.raises(ValueError) as caught:
        TlsConfig.from_env({"SANDBOX_TRANSPORT_MODE": mode})
    assert str(caught.value) == f"SANDBOX_TRANSPORT_MODE is {mode!r}: use one of insecure, tls, mtls"


@pytest.mark.parametrize("missing", ["SANDBOX_TLS_CLIENT_CERT_PATH", "SANDBOX_TLS_CLIENT_KEY_PATH"])
@pytest.mark.parametrize("value", ["", None])
def test_mtls_without_its_files_is_refused(missing: str, value: str | None) -> None:
    environ = {name: text for name, text in MTLS.items() if name != missing or value is not None}
    if value is not None:
        environ[missing] = value
    with pytest.raises(ValueError, match=f"^{missing} is not set: SANDBOX_TRANSPORT_MODE=mtls needs it$"):
        TlsConfig.from_env(environ)


# from_env

MULTI = {
    "SANDBOX_MODE": "multi",
    "SANDBOX_NAMESPACE": "team-a",
    "SANDBOX_IMAGE": "registry.example/sandbox:1",
    "SANDBOX_MAX_SESSIONS": "7",
    "SANDBOX_TCP_PORT": "6000",
    "SANDBOX_INSTANCE_ID": "mcp-0",
    "SANDBOX_MANAGED_BY": "team-a",
    "SANDBOX_CAPACITY_TIMEOUT": "2.5",
    "SANDBOX_WHEN_FULL": "evict",
    "SANDBOX_EVICT_AFTER": "10",
}


def test_from_env_reads_every_variable() -> None:
    assert SandboxManagerConfig.from_env(MULTI | MTLS) == multi(
        namespace="team-a",
        sandbox_image="registry.example/sandbox:1",
        max_sessions=7,
        sandbox_port=6000,
        instance_id="mcp-0",
        managed_by="team-a",
        capacity_timeout=2.5,
        when_full="evict",
        evict_after=10.0,
        tls=TlsConfig.from_env(MTLS),
    )


def test_from_env_reads_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in MULTI.items():
        monkeypatch.setenv(name, value)
    assert SandboxManagerConfig.from_env() == SandboxManagerConfig.from_env(MULTI)


def test_a_warm_pool_of_the_environment() -> None:
    environ = {"SANDBOX_MODE": "multi", "SANDBOX_WARM_POOL": "python"}
    assert SandboxManagerConfig.from_env(environ).warm_pool == "python"
    assert SandboxManagerConfig.from_env(environ | {"SANDBOX_WARM_POOL": ""}).warm_pool is None
    with pytest.raises(ValueError, match=r"^SANDBOX_IMAGE: sandbox_image is 'x': it must be left out"):
        SandboxManagerConfig.from_env(environ | {"SANDBOX_IMAGE": "x"})
    with pytest.raises(ValueError, match=r"^SANDBOX_TLS_SERVER_NAME: tls\.server_name is None"):
        SandboxManagerConfig.from_env(environ | {"SANDBOX_TRANSPORT_MODE": "tls"})


def test_an_empty_variable_is_an_unset_one() -> None:
    environ = dict.fromkeys([*MULTI, *MTLS], "") | {"SANDBOX_MODE": "multi"}
    config = SandboxManagerConfig.from_env(environ)
    assert dataclasses.replace(config, instance_id="x") == multi(instance_id="x")


def test_an_explicit_setting_beats_its_variable() -> None:
    overrides: dict[str, Any] = {
        "mode": "multi",
        "namespace": "team-b",
        "sandbox_image": "other",
        "max_sessions": 3,
        "sandbox_port": 7000,
        "instance_id": "mcp-1",
        "managed_by": "x" * 63,
        "capacity_timeout": 0.5,
        "when_full": "refuse",
        "evict_after": 5,
        "tls": None,
        "ready_timeout": 5,
    }
    assert SandboxManagerConfig.from_env(MULTI | MTLS, **overrides) == multi(**overrides)
    # What is overridden is not even read.
    bad = dict.fromkeys([*MULTI, *MTLS], "bad value")
    assert SandboxManagerConfig.from_env(bad, **overrides) == multi(**overrides)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SANDBOX_MODE", "many", 'SANDBOX_MODE is \'many\': use "single" or "multi"'),
        ("SANDBOX_MAX_SESSIONS", "ten", "SANDBOX_MAX_SESSIONS is 'ten': it must be an integer"),
        (
            "SANDBOX_MAX_SESSIONS",
            "0",
            "SANDBOX_MAX_SESSIONS: max_sessions is 0: it must be an integer of at least 1",
        ),
        ("SANDBOX_EVICT_AFTER", "soon", "SANDBOX_EVICT_AFTER is 'soon': it must be a number of seconds"),
        (
            "SANDBOX_CAPACITY_TIMEOUT",
            "-1",
            "SANDBOX_CAPACITY_TIMEOUT: capacity_timeout is -1.0: it must be a finite number of seconds of"
            " at least 0",
        ),
        (
            "SANDBOX_WHEN_FULL",
            "wait",
            'SANDBOX_WHEN_FULL: when_full is \'wait\': it must be "refuse" or "evict"',
        ),
        ("SANDBOX_TCP_PORT", "1e3", "SANDBOX_TCP_PORT is '1e3': it must be an integer"),
        (
            "SANDBOX_TCP_PORT",
            "70000",
            "SANDBOX_TCP_PORT: sandbox_port is 70000: it must be an integer from 1 to 65535",
        ),
        (
            "SANDBOX_NAMESPACE",
            "A",
            "SANDBOX_NAMESPACE: namespace is 'A': it must be an RFC 1123 label such as 'prodisco'",
        ),
        (
            "SANDBOX_TRANSPORT_MODE",
            "tls",
            "SANDBOX_TLS_SECRET_NAME: tls.secret_name is None: the default pod template mounts the server's"
            " certificate from a Secret; name it, or give a pod_template_spec that brings one",
        ),
        ("SANDBOX_TRANSPORT_MODE", "ssl", "SANDBOX_TRANSPORT_MODE is 'ssl': use one of insecure, tls, mtls"),
    ],
)
def test_from_env_names_a_bad_variable(variable: str, value: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        SandboxManagerConfig.from_env(MULTI | {variable: value})
    assert str(caught.value) == message


def test_from_env_names_an_argument_where_that_was_wrong() -> None:
    with pytest.raises(ValueError, match=r"^namespace is 'A'"):
        SandboxManagerConfig.from_env(MULTI, namespace="A")
    with pytest.raises(ValueError, match=r"^tls\.secret_name is None"):
        SandboxManagerConfig.from_env(MULTI, tls=TlsConfig())


@pytest.mark.parametrize("client", ["localhost:50051", 5, SandboxClient])
def test_what_is_no_client_is_refused(client: Any) -> None:
    with pytest.raises(ValueError, match=r"^single_client is .*: it must be a SandboxClient, such as"):
        SandboxManagerConfig(mode="single", single_client=client)


def test_from_env_names_an_unknown_setting() -> None:
    with pytest.raises(ValueError, match=r"^unknown setting 'max_session': the settings are .*max_sessions"):
        SandboxManagerConfig.from_env(MULTI, max_session=3)


def test_from_env_names_the_target_of_single_mode() -> None:
    environ = {"SANDBOX_TCP_HOST": "sandbox.example", "SANDBOX_TCP_PORT": "6000"}
    config = SandboxManagerConfig.from_env(environ)
    assert config.mode == "single"
    assert (config.single_target, config.single_client) == ("sandbox.example:6000", None)
    # An explicit target beats the environment, which is then not read.
    config = SandboxManagerConfig.from_env({"SANDBOX_USE_TCP": "perhaps"}, single_target="unix:/s.sock")
    assert config.single_target == "unix:/s.sock"
    assert SandboxManagerConfig.from_env(MULTI).single_target is None


@pytest.mark.parametrize("tls", [TlsConfig(ca="ca.pem"), None])
async def test_an_explicit_tls_is_that_of_the_client_of_single_mode(tls: TlsConfig | None) -> None:
    environ = {"SANDBOX_TRANSPORT_MODE": "insecure" if tls else "tls"}
    config = SandboxManagerConfig.from_env(environ, tls=tls)
    assert config.tls == tls
    async with contextlib.aclosing(SandboxManager(config)) as manager:
        client = await manager.get_client()
        assert client._connection.channel.tls == tls  # A client does not tell its certificates.
    assert repr(client).endswith("closed>")


async def test_from_env_leaves_a_client_that_was_passed_in_to_its_owner() -> None:
    async with SandboxClient("localhost:1") as client:
        config = SandboxManagerConfig.from_env({}, single_client=client)
    assert config.single_client is client
    assert config.single_target is None


@pytest.mark.parametrize("target", ["localhost", "http://localhost:1", "", 5])
def test_a_target_of_single_mode_that_is_none_is_named(target: Any) -> None:
    with pytest.raises(ValueError, match=r"^single_target is .*: it must be 'host:port'"):
        SandboxManagerConfig(mode="single", single_target=target)


def test_a_shared_client_and_a_target_for_one_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"^single_target is .*: it must be None where single_client"):
        SandboxManagerConfig(
            mode="single", single_client=SandboxClient("localhost:1"), single_target="localhost:1"
        )


SHARED: dict[str, Any] = {"shared": True, "instance_id": "group"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"instance_id": None}, "instance_id is not set: with shared it must be the same in all managers"),
        ({"lease_duration": None}, "lease_duration is None: it must be left out with shared"),
        (SUSPEND, "on_idle is 'suspend': it must be \"delete\" with shared"),
        ({"session_idle_timeout": 119.0}, "session_idle_timeout is 119.0: it must be at least 4 times"),
        (
            {"clock_skew": 151.0},
            "session_idle_timeout is 600.0: it must be at least 4 times clock_skew (604)",
        ),
        ({"clock_skew": 0}, "clock_skew is 0: it must be a finite number of seconds above 0"),
    ],
)
def test_what_shared_sessions_need(settings: dict[str, Any], message: str) -> None:
    merged = {
        key: value for key, value in (SHARED | settings).items() if (key, value) != ("instance_id", None)
    }
    with pytest.raises(ValueError) as caught:
        multi(**merged)
    assert str(caught.value).startswith(message)


def test_only_a_group_has_a_label_of_a_group() -> None:
    assert multi(**SHARED).instance_label.startswith("shared-")
    assert multi(**SHARED).instance_label == multi(**SHARED, max_sessions=3).instance_label
    assert multi(instance_id="shared-x").instance_label == hashlib.sha256(b"shared-x").hexdigest()[:40]
    assert multi(instance_id="sharedx").instance_label == "sharedx"
    assert SandboxManagerConfig(mode="single", **SHARED).instance_label == "group"


def test_shared_sessions_of_the_environment() -> None:
    environ = {"SANDBOX_MODE": "multi", "SANDBOX_INSTANCE_ID": "group", "SANDBOX_SHARED": "true"}
    assert SandboxManagerConfig.from_env(environ).shared
    assert not SandboxManagerConfig.from_env(environ | {"SANDBOX_SHARED": "0"}).shared
    assert SandboxManagerConfig.from_env(environ | {"SANDBOX_CLOCK_SKEW": "2.5"}).clock_skew == 2.5
    with pytest.raises(ValueError, match=r"^SANDBOX_SHARED is 'yes': it must be true, 1, false or 0"):
        SandboxManagerConfig.from_env(environ | {"SANDBOX_SHARED": "yes"})
    with pytest.raises(ValueError, match=r"^SANDBOX_CLOCK_SKEW is 'x': it must be a number of seconds"):
        SandboxManagerConfig.from_env(environ | {"SANDBOX_CLOCK_SKEW": "x"})
    with pytest.raises(ValueError, match=r"^SANDBOX_CLOCK_SKEW: clock_skew is -1"):
        SandboxManagerConfig.from_env(environ | {"SANDBOX_CLOCK_SKEW": "-1"})
