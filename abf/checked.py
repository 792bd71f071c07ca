"""YAML files into checked settings; every fault is one line: where, what, what to write instead.

A key path is as pydantic has it, without the names of variants: ("sources", 0, "path").
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

import yaml
from pydantic import ValidationError

from abf.base import ConfigModel
from abf.errors import ConfigError

T = TypeVar("T", bound=ConfigModel)
Keys = tuple[str | int, ...]
Where = Callable[[Keys], str]
"""Says of a key path where it was written."""


class _Loader(yaml.SafeLoader):
    """YAML whose keys are text and stand once (of two, the first would silently lose)."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            place = f"{key.start_mark.name}:{key.start_mark.line + 1}"
            if key.tag == MERGE:
                continue
            if key.tag != TEXT:
                shown = key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                raise ConfigError(f"{place}: a key must be text, not {shown}; put it in quotes")
            if key.value in lines:
                raise ConfigError(
                    f"{place}: key {key.value!r} was already given on line {lines[key.value]}; "
                    "keep one of the two"
                )
            lines[key.value] = key.start_mark.line + 1
        return node


MERGE, TEXT = "tag:yaml.org,2002:merge", yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG
# YAML 1.1, which PyYAML reads, takes 1e-3 for text; everybody means the number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ConfigError: missing, not YAML, a key given twice or no text, or not a mapping.
    """
    try:
        loader = _Loader(path.read_bytes().decode("utf-8"))
        loader.name = str(path)
        node = loader.get_single_node()
        value = {} if node is None else loader.construct_object(node, deep=True)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: byte {error.start}") from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_not_yaml(path, error)) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} must hold a mapping of keys, not {_named(value)} (value {_short(value)}); "
            "write `key: value`, with a blank behind the colon"
        )
    return value


_REMEDIES = {
    r"'\\t'": "a tab; indent with spaces",
    r"expected <block end>": "this line is indented less than the lines before that it belongs to, "
    "or more than its neighbours; give the keys of one mapping the same indentation",
    r"mapping values are not allowed": "a second `: ` behind a value; indent the line as its "
    "neighbours are, or put text that holds `: ` in quotes",
    r"expected ',' or '[\]}]'": "the bracket opened on line {first} is not closed, or a comma is "
    "missing",
    r"quoted scalar": "the quote opened on line {first} is not closed",
    r"could not find expected ':'": "a key without `:`; write `key: value`",
}
"""By what PyYAML says (a pattern), what a user has done and is to do."""


def _not_yaml(path: Path, error: yaml.MarkedYAMLError) -> str:
    """One line for a file that does not parse."""
    said = ", ".join(" ".join(part.split()) for part in (error.context, error.problem) if part)
    mark = error.problem_mark or error.context_mark
    first = (error.context_mark or mark).line + 1 if mark else 1
    for pattern, remedy in _REMEDIES.items():
        if re.search(pattern, said):
            said = remedy.format(first=first)
            break
    line = mark.line + 1 if mark else 1
    lines = path.read_text(encoding="utf-8").splitlines()
    shown = f" ({_short(lines[line - 1].strip())})" if 0 < line <= len(lines) else ""
    return f"{path}:{line}: is not YAML{shown}: {said}"


def validate(model: type[T], value: Mapping[str, Any], origin: str | Where) -> T:
    """Check a mapping against a config class, strictly: "3" and true are no numbers.

    JSON is pydantic's strict form that still takes lists for tuples, and text for paths and dates.

    Args:
        model: the class.
        value: what was read.
        origin: where from.

    Raises:
        ConfigError: one line a fault: origin, key path, value, what is allowed.
    """
    where = origin if callable(origin) else lambda keys: origin
    try:
        return model.model_validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            keys, found = _walk(model, fault["loc"])
            said = _explain(keys, found, model, fault)
            lines.append(f"{where(keys or leading_keys(said))}: {said}")
        raise ConfigError("\n".join(lines)) from None


def in_file(path: Path) -> Where:
    """Where a key path stands in a YAML file: the file and its line."""
    return lambda keys: f"{path}:{line}" if (line := find(path, keys)[1]) else str(path)


def find(path: Path, keys: Keys, *, below: Keys = ()) -> tuple[int, int]:
    """How many of the keys a YAML file holds below a place, and the line of the last; 0 for none.

    A key of the file may be dotted, as a grid's are.
    """
    loader = _Loader(path.read_bytes().decode("utf-8"))
    node = loader.get_single_node()
    start, node = _descend(node, below)[1:] if below else (0, node)
    depth, line, _ = _descend(node, keys)
    return depth, line or start


def _descend(node: yaml.Node | None, keys: Keys) -> tuple[int, int, yaml.Node | None]:
    if isinstance(node, yaml.SequenceNode) and keys and isinstance(keys[0], int):
        if keys[0] < len(node.value):
            found = node.value[keys[0]]
            depth, line, last = _descend(found, keys[1:])
            return 1 + depth, line or found.start_mark.line + 1, last
    elif isinstance(node, yaml.MappingNode):
        for count in range(len(keys), 0, -1):
            wanted = ".".join(map(str, keys[:count]))
            for key, value in node.value:
                if key.value == wanted:
                    depth, line, last = _descend(value, keys[count:])
                    return count + depth, line or key.start_mark.line + 1, last
                if count == len(keys) and str(key.value).startswith(f"{wanted}."):
                    return count, key.start_mark.line + 1, value
    return 0, 0, node


def leading_keys(message: str) -> Keys:
    """Key path that a message begins with."""
    found = re.match(r"[a-z]\w*(\.\w+|\[\d+\])*", message)
    parts = re.findall(r"\w+", found[0]) if found else []
    return tuple(int(part) if part.isdigit() else part for part in parts)


def _explain(keys: Keys, found: list[Any], model: type[ConfigModel], fault: Any) -> str:
    """One pydantic fault as `key.path: what is wrong; what is allowed`."""
    kind, value = fault["type"], fault["input"]
    path = dotted(keys)
    if kind == "extra_forbidden":
        known = sorted(_fields(model, fault["loc"][:-1]))
        hint = _close(str(keys[-1]), known)
        if "." in str(keys[-1]):
            hint = (
                "; a dotted path belongs to an arm or axis of a grid: write nested keys in a run."
            )
        return f"{path}: unknown key (value {_short(value)}){hint} Allowed: {', '.join(known)}"
    if kind == "union_tag_invalid":
        tag, tags = fault["ctx"]["tag"], fault["ctx"]["expected_tags"]
        hint = _close(tag, re.findall(r"'(\w+)'", tags))
        return f"{path}.kind: {tag!r} is not one of {tags}{hint}"
    if kind == "union_tag_not_found":
        kinds = sorted(filter(None, map(_kind, found)))
        return f"{path}.kind: missing; it says which variant is meant: {', '.join(kinds)}"
    message = fault["msg"].removeprefix("Value error, ")
    meant = _MEANT.get(kind)
    if meant is not None:
        message = f"must be {meant}, not {_named(value)}"
        if value is None:
            message = "has no value; write one behind the colon, or leave the key out"
    if kind == "string_pattern_mismatch":
        message += ": small letters and digits, no blanks"
    bare = (isinstance(value, dict | ConfigModel) and kind not in _MEANT) or value is None
    shown = "" if bare else f" (value {_short(value)})"
    return f"{path}: {message}{shown}" if path else message


_MEANT = {
    **dict.fromkeys(
        ("model_type", "model_attributes_type", "dict_type"), "a mapping (`key: value` lines)"
    ),
    **dict.fromkeys(("tuple_type", "list_type"), "a list (`[...]`, or lines that begin with `- `)"),
}
"""By pydantic's fault, what a key is to hold."""


def _named(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", str: "text", bool: "true or false"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else "nothing")


def _short(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _close(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.65)
    return f"; did you mean {close[0]!r}?" if close else "."


def members(annotation: Any) -> list[Any]:
    """Types an annotation admits: unions and `Annotated` unfolded."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return members(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [m for arg in typing.get_args(annotation) for m in members(arg)]
    return [annotation]


def _kind(member: Any) -> str | None:
    fields = getattr(member, "model_fields", {})
    return fields["kind"].default if "kind" in fields else None


def _walk(model: type[ConfigModel], location: Keys) -> tuple[Keys, list[Any]]:
    """Keys a person would type (union tags left out), and the types found there."""
    here: list[Any] = [model]
    path: list[str | int] = []
    for step in location:
        tagged = [m for m in here if isinstance(step, str) and _kind(m) == step]
        if tagged:
            here = tagged
            continue
        path.append(step)
        found: list[Any] = []
        for member in here:
            if step in getattr(member, "model_fields", {}):
                found += members(member.model_fields[step].annotation)
            elif typing.get_origin(member) is dict:
                found += members(typing.get_args(member)[1])
            elif typing.get_origin(member) in (tuple, list):
                found += members(typing.get_args(member)[0])
        here = found
    return tuple(path), here


def dotted(keys: Keys) -> str:
    """A key path as a person writes it: `sources[0].path`."""
    return ".".join(f"[{k}]" if isinstance(k, int) else k for k in keys).replace(".[", "[")


def _fields(model: type[ConfigModel], location: Keys) -> set[str]:
    _, found = _walk(model, location)
    return {name for member in found for name in getattr(member, "model_fields", {})}
