from __future__ import annotations

import copy
import datetime as dt
import itertools
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prodisco_sandbox import SandboxManagerConfig, TlsConfig
from prodisco_sandbox._cluster import manifest, metadata, resource
from prodisco_sandbox._cluster.metadata import Object

DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
"""RFC 1035, which a Service's name must keep to: a Sandbox's Service has its name."""

SESSION_IDS = [
    "",
    " ",
    "\x00",
    "a",
    "abc-",
    "abc",
    "-abc",
    "___",
    "__",
    "_.-",
    "ABC",
    "a.b",
    "a/b",
    "a b",
    "ab",
    *("x" * length for length in (39, 40, 41, 62, 63, 64, 253, 10_000)),
    # Alike in their first 40 characters, and in all but characters that a label drops.
    "x" * 40 + "a",
    "x" * 40 + "b",
    "session_1!",
    "session-1",
    "session.1",
    "session 1",
    "sitzung-ä",
    "sitzung-a\u0308",
    "会话",
    "🤖",
    "\ud800",
    "\udfff",
    "\ud83e\udd16",  # The same character as two lone surrogates: another id.
]


def multi(**settings: Any) -> SandboxManagerConfig:
    return SandboxManagerConfig(**{"mode": "multi", "instance_id": "mcp-0", **settings})


# Names and labels


@pytest.mark.parametrize("session_id", SESSION_IDS, ids=ascii)
def test_every_id_makes_a_valid_name_and_label(session_id: str) -> None:
    for incarnation in (0, 1, 2**63):
        assert DNS_LABEL.fullmatch(manifest.SANDBOX.name(session_id, incarnation))
    assert re.fullmatch(r"[0-9a-f]{40}", metadata.session_hash(session_id))


def test_no_two_ids_meet() -> None:
    names = {
        manifest.SANDBOX.name(session_id, incarnation)
        for session_id, incarnation in itertools.product(SESSION_IDS, range(3))
    }
    assert len(names) == 3 * len(SESSION_IDS)
    assert len({metadata.session_hash(session_id) for session_id in SESSION_IDS}) == len(SESSION_IDS)


@given(st.text(st.characters(exclude_categories=())), st.text(st.characters(exclude_categories=())))
def test_ids_meet_only_where_they_are_equal(one: str, other: str) -> None:
    assert (manifest.SANDBOX.name(one) == manifest.SANDBOX.name(other)) is (one == other)
    assert (metadata.session_hash(one) == metadata.session_hash(other)) is (one == other)


@pytest.mark.parametrize("session_id", ["session-1", "x" * 40, "0a1b2c3d4e5f"])
def test_the_id_shows_in_neither(session_id: str) -> None:
    assert session_id not in manifest.SANDBOX.name(session_id)
    assert session_id not in metadata.session_hash(session_id)


def test_names_stay_the_same_between_releases() -> None:
    # A successor finds its predecessor's Sandboxes by these.
    assert metadata.session_hash("session-1") == "84097828fc31a8c8d29210df48901a85de7fd013"
    assert manifest.SANDBOX.name("session-1") == "sandbox-c718d840b7292588ee4f51fb4ae35f75"
    assert manifest.SANDBOX.name("session-1", 1) == "sandbox-f61c8b91a047b3353ece12822ae113e4"


@pytest.mark.parametrize(
    ("args", "selector"),
    [
        ({}, "prodisco.dev/managed-by=mcp-server"),
        ({"instance": "mcp-0"}, "prodisco.dev/managed-by=mcp-server,prodisco.dev/instance=mcp-0"),
        ({"session": "5e"}, "prodisco.dev/managed-by=mcp-server,prodisco.dev/session=5e"),
        (
            {"instance": "mcp-0", "session": "5e"},
            "prodisco.dev/managed-by=mcp-server,prodisco.dev/instance=mcp-0,prodisco.dev/session=5e",
        ),
        # An empty instance is a valid label value, not "any instance".
        ({"instance": ""}, "prodisco.dev/managed-by=mcp-server,prodisco.dev/instance="),
    ],
)
def test_selector(args: dict[str, str], selector: str) -> None:
    assert metadata.managed_selector(**args) == selector


def test_managed_by_is_the_labels_value_everywhere() -> None:
    config = multi(managed_by="team-a")
    body = manifest.SANDBOX.body(config, "v1beta1", "sandbox-x", "5e")
    label = "prodisco.dev/managed-by"
    assert body["metadata"]["labels"][label] == "team-a"
    assert body["spec"]["podTemplate"]["metadata"]["labels"][label] == "team-a"
    assert (
        metadata.managed_selector(managed_by="team-a", session="5e")
        == f"{label}=team-a,prodisco.dev/session=5e"
    )
    assert metadata.is_of(body, "5e", "mcp-0", managed_by="team-a")
    assert not metadata.is_of(body, "5e", "mcp-0")


# The body

LABELS = {
    "app": "sandbox-server",
    "prodisco.dev/managed-by": "mcp-server",
    "prodisco.dev/instance": "mcp-0",
    "prodisco.dev/session": "5e",
}


def env(**variables: str) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in variables.items()]


@pytest.mark.parametrize(
    ("api_version", "running"), [("v1alpha1", {"replicas": 1}), ("v1beta1", {"operatingMode": "Running"})]
)
def test_default_body(api_version: str, running: dict[str, Any]) -> None:
    config = multi(namespace="team-a", sandbox_image="image:1", sandbox_port=6000)
    assert manifest.SANDBOX.body(config, api_version, "sandbox-1", "5e") == {
        "apiVersion": f"agents.x-k8s.io/{api_version}",
        "kind": "Sandbox",
        "metadata": {"name": "sandbox-1", "namespace": "team-a", "labels": LABELS},
        "spec": {
            **running,
            "service": True,
            "podTemplate": {
                "metadata": {"labels": {**LABELS, "prodisco.dev/sandbox": "sandbox-1"}},
                "spec": {
                    "serviceAccountName": "sandbox-server",
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": 5,
                    "containers": [
                        {
                            "name": "sandbox",
                            "image": "image:1",
                            "imagePullPolicy": "IfNotPresent",
                            "ports": [{"name": "grpc", "containerPort": 6000, "protocol": "TCP"}],
                            "env": [
                                *env(
                                    SANDBOX_USE_TCP="true",
                                    SANDBOX_TCP_HOST="0.0.0.0",
                                    SANDBOX_TCP_PORT="6000",
                                    SCRIPTS_CACHE_DIR="/tmp/prodisco-scripts",
                                ),
                                {
                                    "name": "SANDBOX_POD_NAME",
                                    "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}},
                                },
                                *env(SANDBOX_TRANSPORT_MODE="insecure"),
                            ],
                            "resources": {
                                "requests": {"memory": "128Mi", "cpu": "100m"},
                                "limits": {"memory": "512Mi", "cpu": "1", "ephemeral-storage": "1Gi"},
                            },
                            "volumeMounts": [{"name": "scripts-cache", "mountPath": "/tmp/prodisco-scripts"}],
                            "securityContext": {
                                "allowPrivilegeEscalation": False,
                                "capabilities": {"drop": ["ALL"]},
                                "seccompProfile": {"type": "RuntimeDefault"},
                            },
                        }
                    ],
                    "volumes": [{"name": "scripts-cache", "emptyDir": {"sizeLimit": "256Mi"}}],
                },
            },
        },
    }


@pytest.mark.parametrize(
    ("size", "limit"),
    [
        *(("1Gi", 1024), ("1.5Gi", 1536), ("500Mi", 500), ("2Ti", 1024**2), ("1G", 953)),
        *(("1048576", 1), ("2097152k", 2000), ("5000m", 1), ("100Ki", 1)),
    ],
)
def test_the_server_may_fill_the_volume(size: str, limit: int) -> None:
    spec = manifest.SANDBOX.body(multi(workspace_storage=size), "v1beta1", "a", "0" * 40)["spec"]
    env = {e["name"]: e.get("value") for e in spec["podTemplate"]["spec"]["containers"][0]["env"]}
    assert env["SANDBOX_WORKSPACE_LIMIT_MB"] == str(limit)


def test_a_workspace_on_a_volume() -> None:
    """The Sandbox makes a PersistentVolumeClaim of each template, and a volume of its name in the pod."""
    config = multi(workspace_storage="2Gi", workspace_storage_class="fast")
    spec = manifest.SANDBOX.body(config, "v1beta1", "sandbox-x", "0" * 40)["spec"]
    [claim] = spec["volumeClaimTemplates"]
    assert claim["metadata"] == {"name": "workspace"}
    assert claim["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "fast",
        "resources": {"requests": {"storage": "2Gi"}},
    }
    pod = spec["podTemplate"]["spec"]
    [container] = pod["containers"]
    assert {"name": "workspace", "mountPath": "/workspace"} in container["volumeMounts"]
    assert {"name": "SANDBOX_WORKSPACE", "value": "/workspace"} in container["env"]
    assert {"name": "SANDBOX_WORKSPACE_LIMIT_MB", "value": "2048"} in container["env"]
    assert pod["securityContext"]["fsGroup"] == 65532  # of the image's user
    assert "workspace" not in [volume["name"] for volume in pod["volumes"]]
    without = manifest.SANDBOX.body(multi(workspace_storage="2Gi"), "v1beta1", "sandbox-x", "0" * 40)
    assert "storageClassName" not in without["spec"]["volumeClaimTemplates"][0]["spec"]
    assert "volumeClaimTemplates" not in manifest.SANDBOX.body(multi(), "v1beta1", "a", "0" * 40)["spec"]


def test_instance_id_that_is_no_label_value_goes_in_hashed() -> None:
    config = multi(instance_id="not a label")
    body = manifest.SANDBOX.body(config, "v1beta1", "sandbox-1", "5e")
    assert metadata.labels(body)["prodisco.dev/instance"] == config.instance_label
    assert "not a label" not in str(body)


@pytest.mark.parametrize("api_version", manifest.API_VERSIONS)
def test_lease_is_written_with_the_policy_that_makes_it_work(api_version: str) -> None:
    body = manifest.SANDBOX.body(multi(), api_version, "sandbox-1", "5e", "2030-01-01T00:00:00Z")
    assert body["spec"]["shutdownTime"] == "2030-01-01T00:00:00Z"
    assert body["spec"]["shutdownPolicy"] == "Delete"
    assert not {"shutdownTime", "shutdownPolicy"} & set(
        manifest.SANDBOX.body(multi(), api_version, "sandbox-1", "5e")["spec"]
    )


@pytest.mark.parametrize(
    ("tls", "variables"),
    [
        (
            TlsConfig(secret_name="keys"),
            {
                "SANDBOX_TRANSPORT_MODE": "tls",
                "SANDBOX_TLS_CERT_PATH": "/etc/prodisco/tls/tls.crt",
                "SANDBOX_TLS_KEY_PATH": "/etc/prodisco/tls/tls.key",
            },
        ),
        (
            TlsConfig(cert="c.pem", key="k.pem", secret_name="keys"),
            {
                "SANDBOX_TRANSPORT_MODE": "mtls",
                "SANDBOX_TLS_CERT_PATH": "/etc/prodisco/tls/tls.crt",
                "SANDBOX_TLS_KEY_PATH": "/etc/prodisco/tls/tls.key",
                "SANDBOX_TLS_CA_PATH": "/etc/prodisco/tls/ca.crt",
            },
        ),
    ],
    ids=["tls", "mtls"],
)
def test_tls_mounts_the_secret(tls: TlsConfig, variables: dict[str, str]) -> None:
    spec = manifest.SANDBOX.body(multi(tls=tls), "v1beta1", "sandbox-1", "5e")["spec"]["podTemplate"]["spec"]
    [container] = spec["containers"]
    assert container["env"][-len(variables) :] == env(**variables)
    mount = {"name": "tls", "mountPath": "/etc/prodisco/tls", "readOnly": True}
    assert mount in container["volumeMounts"]
    assert {"name": "tls", "secret": {"secretName": "keys"}} in spec["volumes"]


OWN_TEMPLATE = {
    "metadata": {"labels": {"team": "a", "app": "mine"}, "annotations": {"note": "kept"}},
    "spec": {"runtimeClassName": "gvisor", "containers": [{"name": "sandbox", "image": "mine"}]},
}


@pytest.mark.parametrize(
    "template",
    [
        OWN_TEMPLATE,
        {"spec": OWN_TEMPLATE["spec"]},
        {"spec": {}, "metadata": None},
        {"spec": {}, "metadata": {"labels": None, "annotations": {"note": "kept"}}},
    ],
)
def test_own_pod_template_is_kept_whole_and_gains_the_labels(template: dict[str, Any]) -> None:
    before = copy.deepcopy(template)
    config = multi(pod_template_spec=template, tls=TlsConfig(), sandbox_image="not-used")
    made = manifest.SANDBOX.body(config, "v1beta1", "sandbox-1", "5e")["spec"]["podTemplate"]

    metadata = template.get("metadata") or {}
    assert made == {
        "spec": template["spec"],
        "metadata": {
            **metadata,
            # Without ours, `app` for instance, the network policies would not select the pod.
            "labels": {**(metadata.get("labels") or {}), **LABELS, "prodisco.dev/sandbox": "sandbox-1"},
        },
    }
    made["spec"]["containers"] = made["metadata"]["annotations"] = "changed"
    assert template == before


def test_bodies_share_nothing() -> None:
    template = copy.deepcopy(OWN_TEMPLATE)
    for config in (multi(), multi(pod_template_spec=template)):
        one = manifest.SANDBOX.body(config, "v1beta1", "sandbox-1", "5e")
        one["spec"]["podTemplate"]["spec"]["containers"][0]["image"] = "changed"
        other = manifest.SANDBOX.body(config, "v1beta1", "sandbox-1", "5e")
        assert other["spec"]["podTemplate"]["spec"]["containers"][0]["image"] != "changed"


# Leases


@pytest.mark.parametrize(
    ("now", "duration", "time"),
    [
        (0, 1800, "1970-01-01T00:30:00Z"),
        (1_900_000_000, 0.5, "2030-03-17T17:46:40Z"),
        (1_900_000_000.9, 1800.0, "2030-03-17T18:16:40Z"),
        (1_900_000_000.9, 0.1, "2030-03-17T17:46:41Z"),
    ],
)
def test_lease_time(now: float, duration: float, time: str) -> None:
    assert metadata.lease_time(now, duration) == time


NOW = dt.datetime(2030, 1, 1, 12, tzinfo=dt.UTC).timestamp()


@pytest.mark.parametrize(
    ("shutdown_time", "lapsed"),
    [
        ("2030-01-01T11:59:59Z", True),
        ("2030-01-01T12:00:00Z", False),
        ("2030-01-01T12:00:01Z", False),
        ("2030-01-01T11:59:59.999999Z", True),
        ("2030-01-01T13:59:59+02:00", True),
        ("2030-01-01T12:00:01+00:00", False),
        ("2030-01-01T11:59:59", True),
        ("2030-01-01T12:00:01", False),
        # What cannot be read is not taken for lapsed: it would be deleted.
        ("soon", False),
        ("", False),
        (None, False),
        (1_000, False),
    ],
)
def test_lease_lapsed(shutdown_time: object, lapsed: bool) -> None:
    assert manifest.SANDBOX.lapsed({"spec": {"shutdownTime": shutdown_time}}, NOW) is lapsed


@pytest.mark.parametrize("sandbox", [{}, {"spec": None}, {"spec": {}}])
def test_no_lease_never_lapses(sandbox: dict[str, Any]) -> None:
    assert manifest.SANDBOX.lapsed(sandbox, NOW) is False


@given(st.floats(0, 4e9), st.floats(0.001, 1e6))
def test_a_lease_lapses_within_the_second_after_its_time(now: float, duration: float) -> None:
    sandbox = {"spec": manifest.SANDBOX.deadline_spec(metadata.lease_time(now, duration))}
    assert not manifest.SANDBOX.lapsed(sandbox, now + duration - 1)
    assert manifest.SANDBOX.lapsed(sandbox, now + duration + 0.001)


# Reading a Sandbox


@pytest.mark.parametrize("sandbox", [{}, {"metadata": None}, {"metadata": {}}])
def test_an_object_without_metadata_has_nothing_to_tell(sandbox: dict[str, Any]) -> None:
    assert metadata.labels(sandbox) == {}
    assert metadata.uid(sandbox) is None
    assert metadata.is_deleting(sandbox) is False
    assert manifest.pod_ips(sandbox) == ()


def test_metadata_is_read() -> None:
    sandbox = {
        "metadata": {
            "name": "sandbox-1",
            "uid": "u1",
            "labels": {"a": "b"},
            "deletionTimestamp": "2030-01-01",
        },
        "status": {"podIPs": ["10.0.0.1", "fd00::1"]},
    }
    assert metadata.name(sandbox) == "sandbox-1"
    assert metadata.uid(sandbox) == "u1"
    assert metadata.labels(sandbox) == {"a": "b"}
    assert metadata.is_deleting(sandbox) is True
    assert manifest.pod_ips(sandbox) == ("10.0.0.1", "fd00::1")


def condition(
    kind: str, status: str, reason: str | None = None, message: str | None = None
) -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": reason, "message": message}


def not_ready(reason: str, message: str | None = None) -> Object:
    return {"serviceFQDN": FQDN, "conditions": [condition("Ready", "False", reason, message)]}


FQDN = "sandbox-1.prodisco.svc.cluster.local"
READY = condition("Ready", "True", "DependenciesReady", "Pod is Ready; Service Exists")


def sandbox(*conditions: Any, **status: Any) -> Object:
    return {"metadata": {"name": "sandbox-1"}, "status": {"conditions": list(conditions), **status}}


@pytest.mark.parametrize(
    ("status", "phase", "text"),
    [
        (None, "starting", "no status yet (does agent-sandbox's controller run?)"),
        ({}, "starting", "no status yet (does agent-sandbox's controller run?)"),
        # A controller that reports no Ready condition at all: the address is all there is.
        ({"serviceFQDN": FQDN}, "running", "ready"),
        ({"serviceFQDN": FQDN, "conditions": None}, "running", "ready"),
        ({"serviceFQDN": FQDN, "conditions": [condition("Other", "False")]}, "running", "ready"),
        ({"serviceFQDN": FQDN, "conditions": ["?"]}, "running", "ready"),
        ({"serviceFQDN": ""}, "starting", "no address in its status yet"),
        (
            {"serviceFQDN": FQDN, "conditions": [READY]},
            "running",
            "Ready=True, reason DependenciesReady: Pod is Ready; Service Exists",
        ),
        ({"conditions": [READY]}, "starting", "no address in its status yet"),
        # The Service is there before its pod is ready.
        (
            not_ready("DependenciesNotReady", "Pending"),
            "starting",
            "Ready=False, reason DependenciesNotReady: Pending",
        ),
        ({"serviceFQDN": FQDN, "conditions": [condition("Ready", "Unknown")]}, "starting", "Ready=Unknown"),
        ({"serviceFQDN": FQDN, "conditions": [{"type": "Ready"}]}, "starting", "Ready=None"),
        # A terminal reason says so only beside False.
        (
            {"conditions": [condition("Ready", "Unknown", "PodFailed")]},
            "starting",
            "Ready=Unknown, reason PodFailed",
        ),
        *(
            (not_ready(reason), "starting", f"Ready=False, reason {reason}")
            for reason in ("ReconcilerError", "SandboxSuspended", "podfailed")
        ),
        *(
            (not_ready(reason, "exit code 1"), phase, f"Ready=False, reason {reason}: exit code 1")
            for reason, phase in {
                "PodFailed": "dead",
                "PodSucceeded": "dead",
                "SandboxExpired": "starting",
                "InvalidConfiguration": "never",
            }.items()
        ),
        (
            {"serviceFQDN": FQDN, "conditions": [READY, condition("Finished", "True", "PodSucceeded")]},
            "dead",
            "Finished=True, reason PodSucceeded",
        ),
        (
            {"serviceFQDN": FQDN, "conditions": [condition("Finished", "False"), READY]},
            "running",
            "Ready=True, reason DependenciesReady: Pod is Ready; Service Exists",
        ),
    ],
)
def test_readiness(status: dict[str, Any] | None, phase: str, text: str) -> None:
    target = f"{FQDN}:50051" if phase == "running" else None
    seen = manifest.SANDBOX.reading({"metadata": {"name": "sandbox-1"}, "status": status}, multi(), now=NOW)
    assert (seen.phase, seen.target, seen.text) == (phase, target, text)


def test_what_is_being_deleted_will_never_be_ready() -> None:
    deleted = sandbox(READY, serviceFQDN=FQDN)
    deleted["metadata"]["deletionTimestamp"] = "2030-01-01T00:00:00Z"
    seen = manifest.SANDBOX.reading(deleted, multi(), now=NOW)
    assert (seen.phase, seen.target, seen.text) == ("ending", None, "it is being deleted")


@pytest.mark.parametrize(
    ("until", "phase"),
    [("2030-01-01T11:59:59Z", "ending"), ("2030-01-01T12:00:01Z", "starting"), (None, "starting")],
)
def test_expired_counts_only_with_its_own_time_past(until: str | None, phase: str) -> None:
    """Another manager may have moved the time since the controller looked."""
    seen = manifest.SANDBOX.reading(
        {"spec": {"shutdownTime": until}, "status": not_ready("SandboxExpired")}, multi(), now=NOW
    )
    assert (seen.phase, seen.target) == (phase, None)


def at(generation: int, *conditions: Object, **spec: Any) -> Object:
    found = sandbox(*conditions, serviceFQDN=FQDN)
    found["metadata"]["generation"] = generation
    return found | {"spec": spec}


def of(generation: int, *args: str) -> Object:
    return condition(*args) | {"observedGeneration": generation}


@pytest.mark.parametrize(
    ("found", "since", "phase"),
    [
        (at(2, of(2, "Ready", "True"), operatingMode="Running"), 0, "running"),
        (at(2, of(1, "Ready", "True"), operatingMode="Running"), 0, "running"),
        # What the controller saw before our own patch does not count.
        (at(3, of(2, "Ready", "True"), operatingMode="Running"), 3, "starting"),
        (at(3, of(2, "Finished", "True"), of(3, "Ready", "True"), operatingMode="Running"), 3, "running"),
        (at(2, of(2, "Ready", "True"), operatingMode="Running"), 3, "starting"),
        # What it is to be counts more than what it is.
        (at(2, of(1, "Ready", "True"), operatingMode="Suspended"), 0, "suspended"),
        (at(2, of(2, "Finished", "True", "PodSucceeded"), operatingMode="Suspended"), 0, "suspended"),
        (at(2, replicas=0), 0, "suspended"),
        (at(2, replicas=1), 0, "running"),
    ],
)
def test_readiness_by_generation(found: Object, since: int, phase: str) -> None:
    assert manifest.SANDBOX.reading(found, multi(), now=NOW, since=since).phase == phase


@pytest.mark.parametrize(
    ("found", "since", "suspended"),
    [
        (at(2, of(2, "Suspended", "True", "PodTerminated")), 0, True),
        (at(2, of(2, "Suspended", "True", "PodTerminated")), 2, True),
        (at(3, of(2, "Suspended", "True", "PodTerminated")), 3, False),
        (at(3, of(3, "Ready", "False", "DependenciesNotReady")), 3, True),
        (at(2, of(2, "Suspended", "False", "PodTerminating")), 0, False),
        ({"status": {"podIPs": ["10.0.0.1"]}}, 0, False),
        ({"status": {}}, 0, True),
    ],
)
def test_is_suspended(found: Object, since: int, suspended: bool) -> None:
    assert manifest.is_suspended(found, since) is suspended


@pytest.mark.parametrize(
    ("reason", "message", "refusal"),
    [
        ("SandboxSuspended", "exceeded quota", None),
        ("DependenciesNotReady", "Pod exists with phase: Pending; Service Exists", None),
        ("DependenciesNotReady", "Pod exists with phase: Pending: ImagePullBackOff", "permanent"),
        (
            "ReconcilerError",
            'Error seen: pods "s" is forbidden: error looking up service account a/b:'
            ' serviceaccount "b" not found',
            "permanent",
        ),
        ("ReconcilerError", "Error seen: etcdserver: request timed out", None),
        (
            "ReconcilerError",
            'Error seen: pods "s" is forbidden: exceeded quota: q, requested: pods=1',
            "quota",
        ),
        (
            "ReconcilerError",
            'Error seen: pods "s" is forbidden: violates PodSecurity "restricted:latest"',
            "permanent",
        ),
        (
            "ReconcilerError",
            'Error seen: pod "s" is owned by Sandbox/s (UID: 1), not by sandbox "s"',
            "occupied",
        ),
        ("MultiplePods", "multiple pods found", "permanent"),
    ],
)
def test_refusal(reason: str, message: str, refusal: str | None) -> None:
    assert resource.refusal(reason, message) == refusal


@pytest.mark.parametrize(("template", "seconds"), [(None, 5.0), ({"spec": {}}, 30.0)])
def test_grace_period(template: Any, seconds: float) -> None:
    assert manifest.grace_period(multi(pod_template_spec=template)) == seconds


NO_NAME, NAMED = TlsConfig(secret_name="keys"), TlsConfig(secret_name="keys", server_name="sandbox")


@pytest.mark.parametrize(
    ("endpoint", "tls", "status", "target"),
    [
        ("auto", None, {"podIPs": ["10.0.0.1", "10.0.0.2"], "serviceFQDN": FQDN}, "10.0.0.1:50051"),
        ("auto", None, {"podIPs": ["10.0.0.1"]}, "10.0.0.1:50051"),
        ("auto", None, {"podIPs": ["fd00::1"]}, "[fd00::1]:50051"),
        ("auto", None, {"podIPs": [], "serviceFQDN": FQDN}, f"{FQDN}:50051"),
        ("auto", None, {"podIPs": None, "serviceFQDN": FQDN}, f"{FQDN}:50051"),
        ("auto", None, {}, None),
        # A certificate carries the Service's name, not a pod's address.
        ("auto", NO_NAME, {"podIPs": ["10.0.0.1"], "serviceFQDN": FQDN}, f"{FQDN}:50051"),
        ("auto", NO_NAME, {"podIPs": ["10.0.0.1"]}, None),
        ("auto", NAMED, {"podIPs": ["10.0.0.1"], "serviceFQDN": FQDN}, "10.0.0.1:50051"),
        ("pod-ip", None, {"podIPs": ["10.0.0.1"], "serviceFQDN": FQDN}, "10.0.0.1:50051"),
        ("pod-ip", NO_NAME, {"podIPs": ["10.0.0.1"], "serviceFQDN": FQDN}, "10.0.0.1:50051"),
        ("pod-ip", None, {"podIPs": ["fd00::1"]}, "[fd00::1]:50051"),
        ("pod-ip", None, {"serviceFQDN": FQDN}, None),
        ("service", None, {"podIPs": ["10.0.0.1"], "serviceFQDN": FQDN}, f"{FQDN}:50051"),
        ("service", None, {"podIPs": ["10.0.0.1"]}, None),
        (lambda sandbox: "unix:/run/" + sandbox["metadata"]["name"], None, {}, "unix:/run/sandbox-1"),
        (lambda sandbox: None, None, {"podIPs": ["10.0.0.1"], "serviceFQDN": FQDN}, None),
    ],
)
def test_endpoint(endpoint: Any, tls: TlsConfig | None, status: dict[str, Any], target: str | None) -> None:
    config = multi(endpoint=endpoint, tls=tls)
    found = sandbox(**status)
    assert resource.endpoint(found, manifest.machine(found), config) == target
    seen = manifest.SANDBOX.reading(sandbox(READY, **status), config, now=NOW)
    assert (seen.phase, seen.target) == ("starting" if target is None else "running", target)


def test_port_is_the_setting() -> None:
    config = multi(sandbox_port=6000)
    found = sandbox(podIPs=["10.0.0.1"])
    assert resource.endpoint(found, manifest.machine(found), config) == "10.0.0.1:6000"
