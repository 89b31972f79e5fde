"""YAML read strictly: no key twice, 1e-4 is a number, yes and no are words."""

from __future__ import annotations

import re
from typing import Any

from adapters.errors import RequestError, message


def parse_yaml(text: str, where: str) -> Any:
    """YAML read strictly: keys twice are refused, 1e-4 is a number, yes and no are words.

    Raises:
        RequestError: with line and column.
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

    def mapping(loader: Strict, node: yaml.MappingNode) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise RequestError(
                    message("a key that is no word", where=f"{where}, line {key_node.start_mark.line + 1}", found=key)
                )
            if key in result:
                raise RequestError(
                    message(f"the key {key!r} stands twice", where=f"{where}, line {key_node.start_mark.line + 1}")
                )
            result[key] = loader.construct_object(value_node, deep=True)
        return result

    Strict.add_constructor("tag:yaml.org,2002:map", mapping)
    Strict.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
    try:
        return yaml.load(text, Strict)
    except yaml.YAMLError as fault:
        raise RequestError(message("broken YAML", where=where, found=" ".join(str(fault).split()))) from fault
