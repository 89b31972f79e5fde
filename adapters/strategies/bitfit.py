"""BitFit: the backbone's biases train, and the head (Ben Zaken et al., 2022)."""

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
class BitFit:
    """Train every bias of the backbone, normalisation biases included, and the head."""

    name: ClassVar[str] = "bitfit"
    defaults: ClassVar[Mapping[str, object]] = {"learning_rate": 3e-3, "num_train_epochs": 8}

    def resolve(self, model: PreTrainedModel, head: frozenset[str]) -> Self:
        """Nothing is left open, but the backbone must have biases.

        Raises:
            RequestError: the backbone has no biases, as Llama's has not.
        """
        from adapters.errors import RequestError, message

        if not self._biases(model) - head:
            raise RequestError(
                message(
                    "the backbone has no biases to train",
                    where=f"strategy 'bitfit' on {type(model).__name__}",
                    remedy="Take 'lora', or 'probe' for the head alone.",
                )
            )
        return self

    @staticmethod
    def _biases(model: PreTrainedModel) -> set[str]:
        return {name for name, _ in model.named_parameters() if name.endswith((".bias", "_bias"))}

    def apply(self, model: PreTrainedModel) -> set[str]:
        """The biases train; no module changes."""
        return self._biases(model)

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
