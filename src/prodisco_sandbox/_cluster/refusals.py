"""How a refusal reads: by RBAC, by admission, by a quota, for good or for now.

Pure functions over the texts of kube-apiserver. A Status says RBAC, webhooks, policies and
quotas all with 403 alike, and agent-sandbox's controller passes on nothing but the text.
"""

from __future__ import annotations

import re

_RBAC = re.compile(
    r'(?:(?:\S+ (?:"[^"]*" )?is )?forbidden: )?User "(?P<user>(?:[^"\\]|\\.)*)" cannot (?P<verb>\S+)'
    r'(?: (?P<kind>resource|path) "(?P<name>[^"]*)")?(?: in API group "(?P<group>[^"]*)")?'
)
_UNEXPLAINED = re.compile(r"(?:\S+ (?:\"[^\"]*\" )?is )?forbidden[.:]?", re.IGNORECASE)
_DENIED = re.compile(r"admission webhook \".*?\" denied the request|AdmissionPolicy '.*?' .*?denied request")
_PASSING = re.compile(
    r"not yet ready to handle request"  # an admission plugin whose caches are still filling
    r"|failed calling webhook"
    r"|status unknown for quota"  # a quota that is too new to have been counted
    r"|retry after the token is"
    r'|User "(?:[^"\\]|\\.)*" cannot '  # an API server that starts says this to everybody
)
_PERMANENT = re.compile(
    r"violates PodSecurity"
    r'|(?:serviceaccount|secret|configmap)s? "[^"]+" not found'
    r"|is forbidden: (?!error looking up service account)"  # LimitRanger, classes that are missing, ...
    r'|\b[A-Z]\w* "[^"]*" is invalid'
    r"|cannot be handled as a "
    r"|ErrImagePull|ImagePullBackOff|InvalidImageName|ErrImageNeverPull"
)


def missing_rule(text: str, group: str, resource: str, verb: str) -> str | None:
    """What RBAC misses, in words; None where it was not RBAC that refused.

    Group, resource and verb are named where the text, a 403's, names none.
    """
    found = _RBAC.match(text)
    if found is None and text and not _UNEXPLAINED.fullmatch(text.strip()):
        return None
    said = found.groupdict() if found else {}
    if said.get("user") == "system:anonymous":
        return "no credentials reached the API server"
    verb = said.get("verb") or verb
    if said.get("kind") == "path":
        return f'a ClusterRole needs the rule nonResourceURLs ["{said["name"]}"], verbs ["{verb}"]'
    if said.get("kind"):
        group, resource = said["group"] or "", said["name"]
    return f'a Role needs the rule apiGroups ["{group}"], resources ["{resource}"], verbs ["{verb}"]'


def is_denied(text: str) -> bool:
    """Whether an admission webhook or policy has refused, which it may with any HTTP status."""
    return _DENIED.search(text) is not None


def may_pass(text: str) -> bool:
    """Whether the API server could not decide yet: nothing was done, and the same request may succeed."""
    return _PASSING.search(text) is not None


def exceeded_quota(text: str) -> bool:
    """Whether a ResourceQuota is used up: there is room again once something else has gone."""
    return "exceeded quota" in text.lower()


def permanent_refusal(text: str) -> bool:
    """Whether what a controller reports will stay until somebody changes something.

    Not what may pass (a conflict, an old pod of the same name, an API server that starts), nor a quota.
    `text` is a condition's message, one error a line. A single line may still be a lie of a moment (a
    service account that comes a second after its namespace): let several readings agree.
    """
    return any(
        is_denied(line) or (_PERMANENT.search(line) is not None and not may_pass(line))
        for line in text.splitlines()
        if not exceeded_quota(line)
    )
