"""Layer freezing: the last blocks train, everything below them stays as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from adapters.contracts import check_types

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.edits import Edit


@final
@dataclass(frozen=True)
class Freeze:
    """Train the last blocks and what lies above them (final norm, pooler, head).

    Attributes:
        layers: how many blocks train, counted from the top; None with no pattern means 2.
        pattern: instead of `layers`, regular expressions searched in the backbone's parameter names; what any of
            them finds trains. Each must find something.
    """

    name: ClassVar[str] = "freeze"
    defaults: ClassVar[Mapping[str, object]] = {"learning_rate": 3e-4, "num_train_epochs": 8}

    layers: int | None = None
    pattern: tuple[str, ...] | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.pattern, str):
            object.__setattr__(self, "pattern", (self.pattern,))
        elif isinstance(self.pattern, list):
            object.__setattr__(self, "pattern", tuple(self.pattern))
        check_types(self)

    def resolve(self, model: PreTrainedModel, head: frozenset[str]) -> Self:
        """Make the number of blocks concrete and check it.

        Raises:
            RequestError: both options, a number of blocks that is not there, blocks that share weights, a pattern
                that finds nothing.
        """
        from adapters.anatomy import block_lists
        from adapters.errors import RequestError, message

        where = "strategy 'freeze'"
        if self.layers is not None and self.pattern is not None:
            raise RequestError(message("layers and pattern exclude each other", where=where, remedy="Give one."))
        if self.pattern is not None:
            if not self.pattern:
                raise RequestError(
                    message("no pattern is given", where=f"{where}: pattern", remedy="Give one, or layers.")
                )
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
        from adapters.errors import RequestError, message

        names = [name for name, _ in model.named_parameters()]
        found: set[str] = set()
        for pattern in self.pattern or ():
            try:
                hits = {name for name in names if re.search(pattern, name)}
            except re.error as fault:
                raise RequestError(
                    message(f"{pattern!r} is no regular expression", where="freeze: pattern", found=fault)
                ) from fault
            if not hits:
                raise RequestError(
                    message(
                        f"the pattern {pattern!r} finds nothing",
                        where="freeze: pattern",
                        expected="a regular expression that finds parameter names",
                        remedy=f"Names look like {names[0]!r} and {names[len(names) // 2]!r}.",
                    )
                )
            found |= hits
        return found

    def apply(self, model: PreTrainedModel) -> set[str]:
        """The chosen blocks and all above them train; no module changes."""
        from adapters.anatomy import above_blocks, block_lists

        if self.pattern is not None:
            return self._found(model)
        blocks = block_lists(model)[-1]
        top = tuple(f"{path}." for path in blocks.names()[blocks.length - (self.layers or 0) :])
        return {name for name, _ in model.named_parameters() if name.startswith(top)} | above_blocks(model)

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
