"""Full fine-tuning: every parameter trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.edits import Edit


@final
@dataclass(frozen=True)
class Full:
    """Train every parameter of the model."""

    name: ClassVar[str] = "full"
    defaults: ClassVar[Mapping[str, object]] = {"learning_rate": 1e-4, "num_train_epochs": 6}

    def resolve(self, model: PreTrainedModel, head: frozenset[str]) -> Self:
        """Nothing is left open."""
        return self

    def apply(self, model: PreTrainedModel) -> set[str]:
        """Every parameter trains; no module changes."""
        return {name for name, _ in model.named_parameters()}

    def key(self, name: str) -> str:
        """Trained parameters keep their own names."""
        return name

    def edits(self, state: Mapping[str, Tensor]) -> dict[str, Edit]:
        """Each trained tensor takes the place of the old one."""
        from adapters.edits import replace_all

        return replace_all(state)

    def strip(self, model: PreTrainedModel) -> None:
        """Nothing was changed."""

    def sidecars(self) -> dict[str, dict[str, Any]]:
        """None."""
        return {}
