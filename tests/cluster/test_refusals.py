"""How the texts of refusals read; the texts are those of kube-apiserver and of admission plugins."""

from __future__ import annotations

import pytest

from prodisco_sandbox._cluster.refusals import exceeded_quota, missing_rule, permanent_refusal

POD = 'pods "sandbox-1" is forbidden: '
QUOTA = POD + "exceeded quota: q, requested: pods=1, used: pods=5, limited: pods=5"
OWNED = 'pod "sandbox-1" is owned by Sandbox/sandbox-1 (UID: 6f0c), not by sandbox "sandbox-1"'
WEBHOOK = 'admission webhook "validation.gatekeeper.sh" denied the request'

FOR_GOOD = [
    POD + 'violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false (container "sandbox")',
    POD
    + 'error looking up service account prodisco/sandbox-server: serviceaccount "sandbox-server" not found',
    'serviceaccounts "sandbox-server" not found',
    'secret "sandbox-tls" not found',
    'secrets "sandbox-tls" not found',
    'configmap "settings" not found',
    f"{WEBHOOK}: [digest] image has no digest",
    f"{WEBHOOK} without explanation",
    f'{WEBHOOK}: User "alice" cannot create pods here',
    POD + "ValidatingAdmissionPolicy 'p' with binding 'b' denied request: failed expression: has(x)",
    POD + "[maximum cpu usage per Container is 1, but limit is 2]",
    POD + "failed quota: q: must specify limits.cpu for: sandbox",
    POD + "no PriorityClass with name high was found",
    POD + 'pod rejected: RuntimeClass "gvisor" not found',
    POD + "unable to create new content in namespace prodisco because it is being terminated",
    'Pod "sandbox-1" is invalid: spec.containers[0].image: Required value',
    'PersistentVolumeClaim "w-sandbox-1" is invalid: spec.resources[storage]: Invalid value: "0"',
    'Pod in version "v1" cannot be handled as a Pod: unknown field "spec.contaners"',
    'Back-off pulling image "nowhere/none:1": ErrImagePull: not found',
    f"{OWNED}\n{POD}violates PodSecurity",
]
PASSING = [
    "",
    OWNED,
    'service "sandbox-1" is owned by Sandbox/sandbox-1 (UID: 6f0c), not by sandbox "sandbox-1"',
    QUOTA,
    POD + "Exceeded quota: q, requested: pods=1, used: pods=5, limited: pods=5",
    POD + "status unknown for quota: q, resources: pods",
    POD + "not yet ready to handle request",
    POD
    + 'error looking up service account prodisco/x: Get "https://10.0.0.1/api": context deadline exceeded',
    'No API token found for service account "x", retry after the token is automatically created and added',
    'pods is forbidden: User "system:serviceaccount:agent-sandbox-system:c" cannot create resource "pods"'
    ' in API group "" in the namespace "prodisco"',
    'Internal error occurred: failed calling webhook "validate.kyverno.svc": failed to call webhook: Post'
    ' "https://kyverno-svc.kyverno.svc:443/validate": service "kyverno-svc" not found',
    'Operation cannot be fulfilled on pods "sandbox-1": the object has been modified',
    'pods "sandbox-1" already exists',
    "etcdserver: request timed out",
    f"{OWNED}\n{QUOTA}",
]


@pytest.mark.parametrize("text", FOR_GOOD)
def test_what_stays_until_somebody_changes_something(text: str) -> None:
    assert permanent_refusal(text)
    assert permanent_refusal(f"Error seen: {text}")
    assert not exceeded_quota(text)


@pytest.mark.parametrize("text", PASSING)
def test_what_may_pass(text: str) -> None:
    assert not permanent_refusal(text)
    assert not permanent_refusal(f"Error seen: {text}")


def test_a_quota_that_is_used_up() -> None:
    assert [text for text in PASSING if exceeded_quota(text)] == [QUOTA, PASSING[4], f"{OWNED}\n{QUOTA}"]


IS_FORBIDDEN = "sandboxes.agents.x-k8s.io is forbidden: "
SANDBOXES = 'in API group "agents.x-k8s.io" in the namespace "n"'
THE_RULE = 'a Role needs the rule apiGroups ["agents.x-k8s.io"], resources ["sandboxes"], verbs ["list"]'


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (
            f'sandboxes.agents.x-k8s.io is forbidden: User "me" cannot list resource "sandboxes" {SANDBOXES}',
            THE_RULE,
        ),
        (
            f'sandboxes "x" is forbidden: User "a\\"b" cannot list resource "sandboxes" {SANDBOXES}:'
            ' requires one of ["container.thirdPartyObjects.list"] permission(s).',
            THE_RULE,
        ),
        (f'User "me" cannot list resource "sandboxes" {SANDBOXES}', THE_RULE),
        ('User "me" cannot list', THE_RULE),
        ("", THE_RULE),
        ("sandboxes.agents.x-k8s.io is forbidden", THE_RULE),
        ("Forbidden", THE_RULE),
        (
            'users "you" is forbidden: User "me" cannot impersonate resource "users" in API group "" at the'
            " cluster scope",
            'a Role needs the rule apiGroups [""], resources ["users"], verbs ["impersonate"]',
        ),
        (
            'forbidden: User "me" cannot get path "/apis/agents.x-k8s.io/v1beta1"',
            'a ClusterRole needs the rule nonResourceURLs ["/apis/agents.x-k8s.io/v1beta1"], verbs ["get"]',
        ),
        (
            f'{IS_FORBIDDEN}User "system:anonymous" cannot list resource "sandboxes" {SANDBOXES}',
            "no credentials reached the API server",
        ),
        (f"{WEBHOOK}: no", None),
        (f'{WEBHOOK}: sandboxes is forbidden: User "me" cannot list resource "sandboxes"', None),
        ('sandboxes.agents.x-k8s.io "x" is forbidden: by policy', None),
        ("<html><body>403 Forbidden</body></html>", None),
        ("no", None),
    ],
)
def test_what_rbac_misses(text: str, rule: str | None) -> None:
    assert missing_rule(text, "agents.x-k8s.io", "sandboxes", "list") == rule
