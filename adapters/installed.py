"""What the installed transformers knows, read from its source: no module of it is imported, which takes seconds."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, final

from adapters.errors import MissingPackageError, message

NUMBERS = ("int", "float")


@final
@dataclass(frozen=True)
class Setting:
    """One field of `TrainingArguments`.

    Attributes:
        kinds: the names of the types that it may have, "None" among them; an empty set for any.
        choices: the words of its enumeration; empty where it has none.
    """

    kinds: frozenset[str]
    choices: tuple[str, ...] = ()

    def fits(self, value: Any) -> bool:
        """Whether a value is of a kind that the field may have, and one of its words."""
        if not self.kinds:
            return True
        if value is None:
            return "None" in self.kinds
        if isinstance(value, bool):
            return "bool" in self.kinds
        if isinstance(value, int):
            return bool(self.kinds & {"int", "float"})
        if isinstance(value, str):
            return "str" in self.kinds and (not self.choices or value in self.choices)
        return type(value).__name__ in self.kinds

    def expected(self) -> str:
        """The same in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "None": "null"}
        words |= {"dict": "keys and values", "list": "a list"}
        kinds = self.kinds - {"int"} if "float" in self.kinds else self.kinds
        return " or ".join(words[kind] for kind in words if kind in kinds)


def _source(*parts: str) -> ast.Module | None:
    """A file of transformers as a tree; None where this version has no such file.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise MissingPackageError(message("transformers is not installed", remedy="Install it: pip install holdfast."))
    file = Path(spec.origin).parent.joinpath(*parts)
    return ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else None


@cache
def settings() -> Mapping[str, Setting]:
    """Every field that `TrainingArguments` takes, by name."""
    tree = _source("training_args.py")
    assert tree is not None
    words = {**_enumerations(_source("trainer_utils.py")), **_enumerations(tree)}
    (kind,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    found = {}
    for node in kind.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or _is_no_field(node):
            continue
        kinds = _kinds(node.annotation)
        choices = next((words[name] for name in kinds if name in words), ())
        plain = {name for name in kinds if name not in words}
        known = plain <= {"int", "float", "bool", "str", "dict", "list", "None"}
        found[node.target.id] = Setting(frozenset(plain if known else ()), choices)
    return found


def _is_no_field(node: ast.AnnAssign) -> bool:
    """Whether an annotated name is a class variable, or a field that the constructor does not take."""
    if isinstance(node.annotation, ast.Subscript) and ast.unparse(node.annotation.value).endswith("ClassVar"):
        return True
    return isinstance(node.value, ast.Call) and any(
        word.arg == "init" and isinstance(word.value, ast.Constant) and word.value.value is False
        for word in node.value.keywords
    )


def _kinds(annotation: ast.expr) -> set[str]:
    """The types that an annotation names, without what stands inside brackets: `dict[str, Any] | None`."""
    if isinstance(annotation, ast.BinOp):
        return _kinds(annotation.left) | _kinds(annotation.right)
    if isinstance(annotation, ast.Subscript):
        outer = ast.unparse(annotation.value).rpartition(".")[2]
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if outer in ("Optional", "Union"):
            return set().union(*map(_kinds, inner)) | ({"None"} if outer == "Optional" else set())
        return {outer.lower() if outer in ("Dict", "List") else outer}
    if isinstance(annotation, ast.Constant):
        return {"None"} if annotation.value is None else _kinds(ast.parse(str(annotation.value), mode="eval").body)
    return {ast.unparse(annotation).rpartition(".")[2]}


def _enumerations(tree: ast.Module | None) -> dict[str, tuple[str, ...]]:
    """The words of every class of words in a file."""
    found = {}
    for node in tree.body if tree is not None else ():
        if isinstance(node, ast.ClassDef) and [ast.unparse(parent) for parent in node.bases] == ["ExplicitEnum"]:
            values = [entry.value for entry in node.body if isinstance(entry, ast.Assign)]
            found[node.name] = tuple(str(value.value) for value in values if isinstance(value, ast.Constant))
    return found


@cache
def heads(auto_class: str) -> Mapping[str, tuple[str, ...]]:
    """transformers' table of the classes that an Auto class can make: kind of model -> its classes."""
    for node in _auto().body:
        if not isinstance(node, ast.ClassDef) or node.name.lstrip("_") != auto_class:
            continue
        for entry in node.body:
            if isinstance(entry, ast.Assign) and ast.unparse(entry.targets[0]) == "_model_mapping":
                table = _table(_auto(), f"{ast.unparse(entry.value)}_NAMES")
                # A family has one class, or several for the same head (DeiT).
                return {kind: (name,) if isinstance(name, str) else tuple(name) for kind, name in table.items()}
    return {}


@cache
def _auto() -> ast.Module:
    tree = _source("models", "auto", "modeling_auto.py")
    assert tree is not None
    return tree


@cache
def model_types() -> frozenset[str]:
    """Every kind of model that a config.json may name."""
    found: set[str] = set()
    for file in ("auto_mappings.py", "configuration_auto.py"):  # the second one adds to the first one's table
        tree = _source("models", "auto", file)
        if tree is not None:
            found |= _table(tree, "CONFIG_MAPPING_NAMES").keys()
    return frozenset(found)


def _table(tree: ast.Module, name: str) -> dict[str, Any]:
    """A dict of plain values in a module, written as a dict or as a list of pairs, with what is added to it below."""
    found: dict[str, Any] = {}
    for node in tree.body:
        call = node.value if isinstance(node, ast.Expr) else None
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == f"{name}.update":
            value = call.args[0]
        elif not isinstance(target, ast.Name) or target.id != name:
            continue
        elif isinstance(value, ast.Call) and value.args:
            value = value.args[0]
        if isinstance(value, ast.List | ast.Dict):
            with contextlib.suppress(ValueError):  # made of other tables, as none of a task's is
                found.update(ast.literal_eval(value))
    return found
