"""Label and field selectors of list and watch requests."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

from .._cluster.metadata import Object
from ._status import bad_request
from ._validation import label_key_error, label_value_error

_Test = Callable[[str | None], bool]

_REQUIREMENT = re.compile(
    r"""\s*(?P<absent>!)?\s*(?P<key>[A-Za-z0-9./_-]+)\s*
    (?: (?P<equality>==|!=|=) \s* (?P<value>[A-Za-z0-9._-]*) \s*
      | (?<=\s)(?P<membership>in|notin) \s* \( (?P<values>[^()]*) \) \s*
      | (?P<comparison>[<>]) \s* (?P<number>-?[0-9]+) \s*
    )?(?:,|$)""",
    re.VERBOSE,
)
_FIELD = re.compile(r"\s*([^=!]+?)\s*(==|!=|=)\s*(.*?)\s*")
_FIELDS = ("metadata.name", "metadata.namespace")


@dataclass(frozen=True, slots=True)
class Selector:
    """The objects that a list or a watch selects.

    Attributes:
        namespace: The namespace of the request's path.
        everything: Whether neither labels nor fields restrict it.
    """

    namespace: str
    labels: tuple[tuple[str, _Test], ...]
    fields: tuple[tuple[str, _Test], ...]

    @property
    def everything(self) -> bool:
        return not self.labels and not self.fields

    def matches(self, sandbox: Object | None) -> bool:
        if sandbox is None:
            return False
        metadata = sandbox["metadata"]
        labels = metadata.get("labels") or {}
        return (
            metadata["namespace"] == self.namespace
            and all(test(labels.get(key)) for key, test in self.labels)
            and all(test(metadata[field]) for field, test in self.fields)
        )


def selector(namespace: str, labels: str | None, fields: str | None) -> Selector:
    """Parses the selectors of a request.

    Raises:
        ApiException: 400, one of them does not parse.
    """
    return Selector(namespace, _label_tests(labels or ""), _field_tests(fields or ""))


@functools.lru_cache(maxsize=256)
def _label_tests(text: str) -> tuple[tuple[str, _Test], ...]:
    tests: list[tuple[str, _Test]] = []
    position = 0
    while position < len(text):
        match = _REQUIREMENT.match(text, position)
        if match is None or (match["absent"] and any(match.group("equality", "membership", "comparison"))):
            raise bad_request(f"unable to parse requirement: {text[position:]!r}")
        if problem := label_key_error(match["key"]):
            raise bad_request(f"unable to parse requirement: {problem}")
        tests.append((match["key"], _label_test(match)))
        position = match.end()
    if text.strip().endswith(","):
        raise bad_request("found '', expected: identifier after ','")
    return tuple(tests)


def _label_test(match: re.Match[str]) -> _Test:
    if match["absent"]:
        return lambda value: value is None
    if match["comparison"]:
        number, less = int(match["number"]), match["comparison"] == "<"
        return lambda value: _is_integer(value) and (int(value) < number if less else int(value) > number)
    if match["equality"]:
        wanted, inside = frozenset({match["value"]}), match["equality"] != "!="
    elif match["membership"]:
        wanted = frozenset(part.strip() for part in match["values"].split(","))
        inside = match["membership"] == "in"
    else:
        return lambda value: value is not None
    for value in wanted:
        if problem := label_value_error(value):
            raise bad_request(f"unable to parse requirement: {problem}")
    return lambda value: (value in wanted) is inside


def _is_integer(value: str | None) -> TypeGuard[str]:
    return value is not None and re.fullmatch(r"-?[0-9]+", value) is not None


@functools.lru_cache(maxsize=256)
def _field_tests(text: str) -> tuple[tuple[str, _Test], ...]:
    tests: list[tuple[str, _Test]] = []
    for part in text.split(",") if text.strip() else ():
        match = _FIELD.fullmatch(part)
        if match is None:
            raise bad_request(f"invalid selector: '{text}'; can't understand '{part}'")
        field, operator, wanted = match.groups()
        if field not in _FIELDS:
            raise bad_request(f"field label not supported: {field}")
        tests.append((field.removeprefix("metadata."), _equals(wanted, operator != "!=")))
    return tuple(tests)


def _equals(wanted: str, inside: bool) -> _Test:
    return lambda value: (value == wanted) is inside
