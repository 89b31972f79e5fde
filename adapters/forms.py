"""What the modules below a cut return around their hidden states, as data that a later run reads again."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, final

import torch


@final
@dataclass(frozen=True)
class Form:
    """What the modules below the cut return, without their tensors (see `handing.form_of`).

    Attributes:
        output: of the module whose output is kept.
        passed: of each block that is passed.
        dtype: of the hidden states as the model computes them.
    """

    output: Any
    passed: tuple[Any, ...]
    dtype: torch.dtype

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        forms = [_named(form) for form in (self.output, *self.passed)]
        return {"forms": forms, "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Read back what `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError, AttributeError, ImportError: it was not that.
        """
        output, *passed = (_called(form) for form in document["forms"])
        dtype = getattr(torch, document["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(document["dtype"])
        return cls(output, tuple(passed), dtype)


def _named(form: Any) -> Any:
    """A form as plain data: a class goes by its name."""
    if form is None or isinstance(form, int):
        return form
    kind, field = form
    return [kind.__module__, kind.__qualname__, field]


def _called(named: Any) -> Any:
    """The form that `_named` wrote down: classes of transformers' own, and no others."""
    if named is None or isinstance(named, int):
        return named
    from transformers.utils.generic import ModelOutput

    module, name, field = named
    kind = getattr(importlib.import_module(module), name) if module.startswith("transformers.") else None
    if not (isinstance(kind, type) and issubclass(kind, ModelOutput) and isinstance(field, str)):
        raise ValueError(named)
    return kind, field
