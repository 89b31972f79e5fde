"""BitFit: the backbone's biases train, and the head (Ben Zaken et al., 2022)."""

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
class BitFit:
    """Train every bias of the backbone, normalisation biases included, and the head.

    Attributes:
        layer_decay: the biases of each block learn this many times as fast as those of the one above it, the head at
            the full rate (Clark et al., 2020); 1 for one rate.
    """

    name: ClassVar[str] = "bitfit"
    defaults: ClassVar[Mapping[str, object]] = {"learning_rate": 3e-3, "num_train_epochs": 8}

    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)

    def resolve(self, model: PreTrainedModel, head: frozenset[str]) -> Self:
        """Nothing is left open, but the backbone must have biases.

        Raises:
            RequestError: the backbone has no biases, as Llama's has not; a decay that cannot be.
        """
        from adapters.errors import RequestError, message
        from adapters.pace import check_decay

        if not self._biases(model) - head:
            raise RequestError(
                message(
                    "the backbone has no biases to train",
                    where=f"strategy 'bitfit' on {type(model).__name__}",
                    remedy="Take 'lora', or 'probe' for the head alone." if head else "Take 'lora'.",
                )
            )
        check_decay(model, self.layer_decay, f"strategy {self.name!r}")
        return self

    @staticmethod
    def _biases(model: PreTrainedModel) -> set[str]:
        from adapters.anatomy import passed_over

        found = {name for name, _ in model.named_parameters() if name.endswith((".bias", "_bias"))}
        return found - passed_over(model)

    def apply(self, model: PreTrainedModel) -> set[str]:
        """The biases train; no module changes."""
        return self._biases(model)

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
        """Each trained bias takes the place of the old one."""
        from adapters.edits import replace_all

        return replace_all(state)

    def strip(self, model: PreTrainedModel) -> None:
        """Nothing was changed."""

    def sidecars(self) -> dict[str, dict[str, Any]]:
        """None."""
        return {}
