"""Full fine-tuning: every parameter trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from adapters.options import check_types

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.edits import Edit
    from adapters.pace import Pace


@final
@dataclass(frozen=True)
class Full:
    """Train every parameter of the model.

    Attributes:
        layer_decay: each block learns this many times as fast as the one above it, the head at the full rate (Clark
            et al., 2020); 1 for one rate.
    """

    name: ClassVar[str] = "full"
    defaults: ClassVar[Mapping[str, object]] = {"learning_rate": 1e-4, "num_train_epochs": 6}

    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)

    def resolve(self, model: PreTrainedModel, head: frozenset[str]) -> Self:
        """Nothing is left open.

        Raises:
            RequestError: a decay out of range, or over blocks that share weights.
        """
        from adapters.pace import check_decay

        check_decay(model, self.layer_decay, f"strategy {self.name!r}")
        return self

    def apply(self, model: PreTrainedModel) -> set[str]:
        """Every parameter of what runs trains; no module changes."""
        from adapters.anatomy import passed_over

        return {name for name, _ in model.named_parameters()} - passed_over(model)

    def begin(self, model: PreTrainedModel) -> None:
        """Training starts from the backbone's own values."""

    def paces(self, model: PreTrainedModel, trained: Sequence[str]) -> Mapping[str, Pace]:
        """Slower by `layer_decay` with each block below the head."""
        from adapters.pace import decayed

        return decayed(model, trained, self.layer_decay)

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
