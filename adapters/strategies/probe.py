"""Linear probe: the head alone trains, on the frozen backbone's features (Alain and Bengio, 2016)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.edits import Edit
    from adapters.pace import Pace


@final
@dataclass(frozen=True)
class Probe:
    """Train the head (and whatever loading made new) and nothing else."""

    name: ClassVar[str] = "probe"
    defaults: ClassVar[Mapping[str, object]] = {"learning_rate": 1e-2, "num_train_epochs": 20}

    def resolve(self, model: PreTrainedModel, head: frozenset[str]) -> Self:
        """A probe needs a head to train.

        Raises:
            RequestError: the task brings no head.
        """
        from adapters.errors import RequestError, message

        if not head:
            raise RequestError(
                message(
                    "there is no head to train: the output layer belongs to the backbone",
                    where=f"strategy 'probe' on {type(model).__name__}",
                    remedy="Take 'lora', or 'freeze' for the last blocks.",
                )
            )
        return self

    def apply(self, model: PreTrainedModel) -> set[str]:
        """Nothing of the backbone trains."""
        return set()

    def begin(self, model: PreTrainedModel) -> None:
        """Training starts from the backbone's own values."""

    def paces(self, model: PreTrainedModel, trained: Sequence[str]) -> Mapping[str, Pace]:
        """The head at the run's learning rate."""
        return {}

    def key(self, name: str) -> str:
        """Trained parameters keep their own names."""
        return name

    def edits(self, state: Mapping[str, Tensor]) -> dict[str, Edit]:
        """The head is put in place; the backbone stays as it is."""
        from adapters.edits import replace_all

        return replace_all(state)

    def strip(self, model: PreTrainedModel) -> None:
        """Nothing was changed."""

    def sidecars(self) -> dict[str, dict[str, Any]]:
        """None."""
        return {}
