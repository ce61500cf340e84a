"""The kinds of objects that the fake API server knows, each a value: agent-sandbox's definitions (0.5.6).

Of the schemas, they hold the parts that mistakes are likely to violate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .._cluster import claim, manifest

EXTENSIONS = claim.GROUP


@dataclass(frozen=True, slots=True)
class Schema:
    """What a value must be.

    Attributes:
        type: Its type.
        fields: Of an object: the fields that are checked; others may hold anything.
        required: Of an object: the fields that must be there.
        items: Of an array: what its items must be.
        values: Of a string: the only ones allowed; empty: all.
        default: What the server sets where it is missing.
        date: Whether a string must be a date-time.
        least: The least number, or the least length of a string.
    """

    type: type
    fields: Mapping[str, Schema] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    items: Schema | None = None
    values: tuple[str, ...] = ()
    default: Any = None
    date: bool = False
    least: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """A definition that is installed.

    Attributes:
        group: API group.
        kind: Name in bodies.
        plural: Name in paths.
        short: Name for kubectl.
        versions: All that it may be served in.
        schema: Of its spec and status.
    """

    group: str
    kind: str
    plural: str
    short: str
    versions: tuple[str, ...]
    schema: Schema

    @property
    def resource(self) -> str:
        return f"{self.plural}.{self.group}"


def _object(*required: str, **fields: Schema) -> Schema:
    return Schema(dict, fields, required)


def _array(items: Schema) -> Schema:
    return Schema(list, items=items)


def _choice(*values: str, default: str | None = None) -> Schema:
    return Schema(str, values=values, default=default)


_TEXT, _BOOL, _COUNT, _TIME = Schema(str), Schema(bool), Schema(int, least=0), Schema(str, date=True)
_REFERENCE = _object("name", name=_TEXT)
_CONDITIONS = _array(
    _object(
        *("lastTransitionTime", "message", "reason", "status", "type"),
        lastTransitionTime=_TIME,
        message=_TEXT,
        reason=Schema(str, least=1),
        status=_choice("True", "False", "Unknown"),
        type=_TEXT,
    )
)
_POD_TEMPLATE = _object("spec", spec=_object("containers", containers=Schema(list)))
_VOLUMES = _array(_object("spec", spec=_object()))

SANDBOX = Kind(
    *(manifest.GROUP, manifest.KIND, manifest.PLURAL, "sandbox", manifest.API_VERSIONS),
    _object(
        "spec",
        spec=_object(
            "podTemplate",
            podTemplate=_POD_TEMPLATE,
            service=_BOOL,
            shutdownTime=_TIME,
            shutdownPolicy=_choice("Delete", "Retain", default="Retain"),
            operatingMode=_choice("Running", "Suspended"),
        ),
        status=_object(conditions=_CONDITIONS, podIPs=Schema(list), serviceFQDN=_TEXT),
    ),
)
CLAIM = Kind(
    *(EXTENSIONS, claim.KIND, claim.PLURAL, "sandboxclaim", claim.CLAIM.versions),
    _object(
        "spec",
        spec=_object(
            "warmPoolRef",
            warmPoolRef=_REFERENCE,
            lifecycle=_object(
                shutdownTime=_TIME,
                shutdownPolicy=_choice("Delete", "DeleteForeground", "Retain", default="Retain"),
                ttlSecondsAfterFinished=_COUNT,
            ),
            additionalPodMetadata=_object(labels=_object(), annotations=_object()),
            env=_array(_object("name", "value", name=_TEXT, value=_TEXT, containerName=_TEXT)),
            volumeClaimTemplates=_VOLUMES,
        ),
        status=_object(conditions=_CONDITIONS, sandbox=_object(name=_TEXT, podIPs=_array(_TEXT))),
    ),
)
POOL = Kind(
    *(EXTENSIONS, "SandboxWarmPool", "sandboxwarmpools", "swp", ("v1beta1",)),
    _object(
        "spec",
        spec=_object(
            "sandboxTemplateRef",
            sandboxTemplateRef=_REFERENCE,
            replicas=Schema(int, least=0, default=1),
            updateStrategy=_object(type=_choice("Recreate", "OnReplenish", default="OnReplenish")),
        ),
        status=_object(replicas=Schema(int), readyReplicas=Schema(int), selector=_TEXT),
    ),
)
TEMPLATE = Kind(
    *(EXTENSIONS, "SandboxTemplate", "sandboxtemplates", "sandboxtemplate", ("v1beta1",)),
    _object(
        "spec",
        spec=_object(
            "podTemplate",
            podTemplate=_POD_TEMPLATE,
            service=_BOOL,
            envVarsInjectionPolicy=_choice("Allowed", "Overrides", "Disallowed", default="Disallowed"),
            networkPolicyManagement=_choice("Managed", "Unmanaged", default="Managed"),
            volumeClaimTemplates=_VOLUMES,
            volumeClaimTemplatesPolicy=_choice("Disallowed", "Allowed", "Overrides", default="Disallowed"),
        ),
    ),
)
KINDS = (CLAIM, SANDBOX, POOL, TEMPLATE)
"""In the order in which a test's name for an object is looked up: a session's first."""
