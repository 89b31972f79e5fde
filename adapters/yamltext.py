"""YAML read strictly: no key twice, 1e-4 is a number, yes and no are words; with the line of every key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from adapters.errors import RequestError, message


@final
@dataclass(frozen=True)
class Document:
    """A YAML text that was read.

    Attributes:
        value: what it says; of a key that stands twice, what the last one says.
        lines: path of keys, as in ("train", "seed") -> the line that it stands in, counted from 1.
        faults: keys that stand twice or are no words, each with its line.
    """

    value: Any
    lines: Mapping[tuple[str, ...], int]
    faults: tuple[str, ...]


def parse_yaml(text: str, where: str) -> Any:
    """YAML read strictly: keys twice are refused, 1e-4 is a number, yes and no are words.

    Raises:
        RequestError: with the line of every such key; or broken YAML, with line and column.
    """
    document = read_yaml(text, where)
    if document.faults:
        raise RequestError(*document.faults)
    return document.value


def read_yaml(text: str, where: str) -> Document:
    """The same, with keys that stand twice as faults of the document.

    Raises:
        RequestError: broken YAML, with line and column.
    """
    import yaml

    class Strict(yaml.SafeLoader):
        """PyYAML's safe loader with YAML 1.2's numbers and booleans, and no key twice."""

    Strict.yaml_implicit_resolvers = {
        first: [
            (tag, pattern) for tag, pattern in entries if not tag.endswith((":bool", ":float", ":int", ":timestamp"))
        ]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Strict.add_implicit_resolver(
        "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
    )
    Strict.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
    Strict.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
        list("-+.0123456789"),
    )
    faults: list[tuple[int, str]] = []

    def mapping(loader: Strict, node: yaml.MappingNode) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str | int | float | bool | None):
                faults.append((line, message("a key that is no word", where=f"{where}, line {line}", found=key)))
                continue
            if key in result:
                faults.append((line, message(f"the key {key!r} stands twice", where=f"{where}, line {line}")))
            result[key] = loader.construct_object(value_node, deep=True)
        return result

    Strict.add_constructor("tag:yaml.org,2002:map", mapping)
    Strict.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
    lines: dict[tuple[str, ...], int] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        for key_node, value_node in node.value if isinstance(node, yaml.MappingNode) and len(path) < 8 else ():
            lines[(*path, str(key_node.value))] = key_node.start_mark.line + 1
            walk(value_node, (*path, str(key_node.value)))

    loader = Strict(text)
    try:
        node = loader.get_single_node()
        value = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as fault:
        raise RequestError(message("broken YAML", where=where, found=" ".join(str(fault).split()))) from fault
    finally:
        loader.dispose()
    walk(node, ())
    return Document(value, lines, tuple(said for _, said in sorted(faults)))
