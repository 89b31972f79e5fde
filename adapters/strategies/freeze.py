"""Layer freezing: the last blocks train, everything below them stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from adapters.options import check_types

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.edits import Edit
    from adapters.pace import Pace


@final
@dataclass(frozen=True)
class Freeze:
    """Train the last blocks and what lies above them (final norm, pooler, head).

    Attributes:
        layers: how many blocks train, counted from the top; None with no pattern means 2.
        pattern: instead of `layers`, regular expressions searched in the backbone's parameter names; what any of
            them finds trains. Each must find something.
        unfreeze_every: gradual unfreezing (Howard and Ruder, 2018): what lies above the blocks trains from the start,
            the top block joins after this many epochs, the next one after twice as many, until all of `layers` train;
            None lets all of them train from the start. Where no head lies above, the top block starts.
        layer_decay: each block learns this many times as fast as the one above it, the head at the full rate (Clark
            et al., 2020); 1 for one rate.
    """

    name: ClassVar[str] = "freeze"
    defaults: ClassVar[Mapping[str, object]] = {"learning_rate": 3e-4, "num_train_epochs": 8}

    layers: int | None = None
    pattern: tuple[str, ...] | str | None = None
    unfreeze_every: int | None = None
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.pattern, str):
            object.__setattr__(self, "pattern", (self.pattern,))
        elif isinstance(self.pattern, list):
            object.__setattr__(self, "pattern", tuple(self.pattern))
        check_types(self)
        self._check()

    def _check(self) -> None:
        """What can be told without a model."""
        from adapters.errors import RequestError, message

        where = "strategy 'freeze'"
        if self.unfreeze_every is not None and (isinstance(self.unfreeze_every, bool) or self.unfreeze_every < 1):
            raise RequestError(
                message(
                    "a wrong number of epochs",
                    where=f"{where}: unfreeze_every",
                    expected="a whole number > 0",
                    found=self.unfreeze_every,
                )
            )
        if self.unfreeze_every is not None and self.pattern is not None:
            raise RequestError(
                message(
                    "unfreezing goes block by block", where=f"{where}: unfreeze_every, pattern", remedy="Give layers."
                )
            )
        if self.layers is not None and self.pattern is not None:
            raise RequestError(message("layers and pattern exclude each other", where=where, remedy="Give one."))
        if self.pattern == ():
            raise RequestError(message("no pattern is given", where=f"{where}: pattern", remedy="Give one, or layers."))
        if self.layers is not None and (isinstance(self.layers, bool) or self.layers < 1):
            raise RequestError(
                message(
                    "a wrong number of blocks", where=f"{where}: layers", expected="1 to all of them", found=self.layers
                )
            )

    def resolve(self, model: PreTrainedModel, head: frozenset[str]) -> Self:
        """Make the number of blocks concrete and check it.

        Raises:
            RequestError: both options, a number of blocks that is not there, blocks that share weights, a pattern
                that finds nothing; unfreezing or decay that cannot be.
        """
        from adapters.anatomy import block_lists
        from adapters.errors import RequestError, message
        from adapters.pace import check_decay

        where = "strategy 'freeze'"
        check_decay(model, self.layer_decay, where)
        if self.pattern is not None:
            self._found(model)
            return self
        lists = block_lists(model)
        if not lists:
            raise RequestError(
                message(
                    "no blocks were found",
                    where=f"{where} on {type(model).__name__}",
                    remedy="Name what trains: pattern='regular expression over parameter names'.",
                )
            )
        if any(blocks.shared for blocks in lists):
            raise RequestError(
                message(
                    "the backbone's blocks share one set of weights: the last cannot train apart from the first",
                    where=f"{where} on {type(model).__name__}",
                    remedy="Take 'lora', 'bitfit', 'probe' or 'full'.",
                )
            )
        depth = lists[-1].length
        layers = min(2, depth) if self.layers is None else self.layers
        if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= depth:
            raise RequestError(
                message("a wrong number of blocks", where=f"{where}: layers", expected=f"1 to {depth}", found=layers)
            )
        return replace(self, layers=layers)

    def _found(self, model: PreTrainedModel) -> set[str]:
        from adapters.anatomy import found_parameters

        return found_parameters(model, self.pattern or (), "freeze: pattern")

    def apply(self, model: PreTrainedModel) -> set[str]:
        """The chosen blocks and all above them train; no module changes."""
        from adapters.order import above_blocks

        if self.pattern is not None:
            return self._found(model)
        top = tuple(self._top(model))
        return {name for name, _ in model.named_parameters() if name.startswith(top)} | above_blocks(model)

    def _top(self, model: PreTrainedModel) -> list[str]:
        """The prefixes of the blocks that train, bottom to top."""
        from adapters.anatomy import block_lists

        blocks = block_lists(model)[-1]
        return [f"{path}." for path in blocks.names()[blocks.length - (self.layers or 0) :]]

    def begin(self, model: PreTrainedModel) -> None:
        """Training starts from the backbone's own values."""

    def paces(self, model: PreTrainedModel, trained: Sequence[str]) -> Mapping[str, Pace]:
        """Slower by `layer_decay` with each block below the head; block after block with `unfreeze_every`."""
        from adapters.pace import decayed, joined

        paces = decayed(model, trained, self.layer_decay)
        if self.unfreeze_every is None:
            return paces
        blocks, names = self._top(model), set(trained)
        above = [p for n, p in model.named_parameters() if n in names and not n.startswith(tuple(blocks))]
        # A head begins alone; a final norm by itself is nothing to begin with.
        first = 1 if any(parameter.dim() > 1 for parameter in above) else 0
        starts = {block: (first + turn) * self.unfreeze_every for turn, block in enumerate(reversed(blocks))}
        return joined(paces, trained, starts)

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
