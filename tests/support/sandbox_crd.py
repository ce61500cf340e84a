"""A compact definition of agent-sandbox's Sandbox, with the fields that matter here.

The real one spells out all of a pod's fields, some 4,000 lines for each version; the
directory that AGENT_SANDBOX_CRDS names may hold those.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_TEXTS: Schema = {"type": "object", "additionalProperties": _TEXT}
_TIME: Schema = {"type": "string", "format": "date-time"}

_CONDITION: Schema = {
    "type": "object",
    "required": ["lastTransitionTime", "message", "reason", "status", "type"],
    "properties": {
        "lastTransitionTime": _TIME,
        "message": _TEXT,
        "observedGeneration": {"type": "integer", "minimum": 0},
        "reason": {"type": "string", "minLength": 1},
        "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
        "type": _TEXT,
    },
}
_CONTAINER: Schema = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": _TEXT},
    "x-kubernetes-preserve-unknown-fields": True,
}
_POD_SPEC: Schema = {
    "type": "object",
    "required": ["containers"],
    "properties": {"containers": {"type": "array", "items": _CONTAINER}},
    "x-kubernetes-preserve-unknown-fields": True,
}
_POD_TEMPLATE: Schema = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "metadata": {"type": "object", "properties": {"annotations": _TEXTS, "labels": _TEXTS}},
        "spec": _POD_SPEC,
    },
}
_STATUS: Schema = {
    "type": "object",
    "properties": {
        "conditions": {"type": "array", "items": _CONDITION},
        "nodeName": _TEXT,
        "podIPs": {"type": "array", "items": _TEXT},
        "selector": _TEXT,
        "service": _TEXT,
        "serviceFQDN": _TEXT,
    },
}
_OF_VERSION: dict[str, Schema] = {
    "v1beta1": {
        "operatingMode": {"type": "string", "enum": ["Running", "Suspended"], "default": "Running"},
    },
    "v1alpha1": {
        "replicas": {"type": "integer", "minimum": 0, "maximum": 1, "default": 1},
    },
}


def sandbox_crd(*versions: str) -> Schema:
    """The CustomResourceDefinition that serves these versions and stores the first."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "sandboxes.agents.x-k8s.io"},
        "spec": {
            "group": "agents.x-k8s.io",
            "names": {
                "kind": "Sandbox",
                "listKind": "SandboxList",
                "plural": "sandboxes",
                "singular": "sandbox",
                "shortNames": ["sandbox"],
            },
            "scope": "Namespaced",
            "versions": [_version(name, stored=name == versions[0]) for name in versions],
        },
    }


def real_crd(name: str) -> Path | None:
    """A definition of a release of agent-sandbox, where AGENT_SANDBOX_CRDS names their directory."""
    directory = os.environ.get("AGENT_SANDBOX_CRDS")
    return Path(directory) / name if directory else None


def _version(name: str, *, stored: bool) -> Schema:
    spec: Schema = {
        "type": "object",
        "required": ["podTemplate"],
        "properties": {
            "podTemplate": _POD_TEMPLATE,
            "service": {"type": "boolean"},
            "shutdownPolicy": {"type": "string", "enum": ["Delete", "Retain"], "default": "Retain"},
            "shutdownTime": _TIME,
            **_OF_VERSION[name],
        },
    }
    schema: Schema = {"type": "object", "required": ["spec"], "properties": {"spec": spec, "status": _STATUS}}
    return {
        "name": name,
        "served": True,
        "storage": stored,
        "schema": {"openAPIV3Schema": schema},
        "subresources": {"status": {}},
    }
