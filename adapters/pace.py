"""The pace of each parameter: its share of the run's learning rate, and the epoch from which it trains."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

from transformers import TrainerCallback

from adapters.anatomy import block_lists
from adapters.errors import RequestError, message
from adapters.order import above_blocks

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, TrainingArguments

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class Pace:
    """How one parameter learns where it is not like all others.

    Attributes:
        factor: times the run's learning rate.
        start: full epochs that pass before it takes its first step.
    """

    factor: float = 1.0
    start: int = 0


def check_decay(model: PreTrainedModel, decay: float, where: str) -> None:
    """Whether a layer-wise decay can be had on this model.

    Raises:
        RequestError: out of range, no blocks, or blocks that share their weights.
    """
    if isinstance(decay, bool) or not 0 < decay <= 1:
        raise RequestError(
            message(
                "a wrong decay", where=f"{where}: layer_decay", expected="a number above 0, up to 1", found=repr(decay)
            )
        )
    if decay == 1:
        return
    lists = block_lists(model)
    if not lists or any(blocks.shared for blocks in lists):
        raise RequestError(
            message(
                "the blocks share one set of weights" if lists else "no blocks were found",
                where=f"{where} on {type(model).__name__}: layer_decay",
                remedy="Leave layer_decay out.",
            )
        )


def distances(model: PreTrainedModel) -> dict[str, int]:
    """How many blocks down from the head each parameter lies.

    0 for the head and what runs after a stack of blocks, 1 for the top block, and one more than the deepest block for
    the embeddings. The two stacks of an encoder-decoder are counted each from its own top.
    """
    lists = block_lists(model)
    names = [name for name, _ in model.named_parameters()]
    base = {id(parameter) for parameter in model.base_model.parameters()}
    found = {name: 0 for name, parameter in model.named_parameters() if id(parameter) not in base}
    found |= dict.fromkeys(above_blocks(model), 0)
    for blocks in lists:
        for index, path in enumerate(blocks.names()):
            found |= {name: blocks.length - index for name in names if name.startswith(f"{path}.")}
        # A stack's own final norm, registered after its blocks.
        stack = f"{blocks.path.rpartition('.')[0]}."
        last = max(index for index, name in enumerate(names) if name.startswith(f"{blocks.path}."))
        above = [name for name in names[last + 1 :] if name.startswith(stack) and "embed" not in name]
        found |= {name: found.get(name, 0) for name in above}
    below = max((blocks.length for blocks in lists), default=0) + 1
    return {name: found.get(name, below) for name in names}


def decayed(model: PreTrainedModel, trained: Sequence[str], decay: float) -> dict[str, Pace]:
    """The paces of layer-wise learning-rate decay: decay ** distance from the head.

    Source: ELECTRA, Clark et al. 2020, section 3.1; BEiT, Bao et al. 2022, appendix H.
    """
    if decay == 1:
        return {}
    far = distances(model)
    return {name: Pace(factor=decay ** far[name]) for name in trained if far[name]}


def joined(paces: Mapping[str, Pace], trained: Sequence[str], starts: Mapping[str, int]) -> dict[str, Pace]:
    """The paces of gradual unfreezing.

    Args:
        paces: what is known of the parameters' rates.
        trained: all names that train.
        starts: prefix of a block -> epochs that pass before it joins.

    Source: ULMFiT, Howard and Ruder 2018, section 3.3.
    """
    result = dict(paces)
    for block, start in starts.items():
        for name in trained:
            if name.startswith(block):
                result[name] = replace(result.get(name, Pace()), start=start)
    return result


def check_run(paces: Mapping[str, Pace], args: TrainingArguments, *, own_optimizer: bool) -> None:
    """Whether a run can keep to the paces, and gives every parameter its turn.

    Raises:
        RequestError: the caller's own optimizer, or a run that ends before one joins.
    """
    if paces and own_optimizer:
        raise RequestError(
            message(
                "an optimizer of one's own has its own groups and rates",
                where="optimizers",
                found=f"a strategy with rates for {len(paces)} parameters",
                remedy="Leave out optimizers, or the strategy's layer_decay and unfreeze_every.",
            )
        )
    last = max((entry.start for entry in paces.values()), default=0)
    if last and args.max_steps <= 0 and last >= args.num_train_epochs:
        raise RequestError(
            message(
                "the run ends before all blocks have joined",
                where="unfreeze_every, num_train_epochs",
                expected=f"more than {last} epochs",
                found=f"{args.num_train_epochs:g}",
                remedy="Give more epochs, a smaller unfreeze_every, or fewer layers.",
            )
        )


def haste(settings: dict[str, Any], args: TrainingArguments, own: Mapping[str, Any], *, solved: bool) -> float:
    """How many times its learning rate a run learns at: `warm_learning_rate`, where the head starts solved.

    Args:
        settings: of the record, which get the rate.
        args, own: the run's settings.
        solved: the head starts so, or did so before the checkpoint from which the run goes on.
    """
    rate = own.get("warm_learning_rate")
    found = rate / args.learning_rate if solved and rate is not None else 1.0
    if found != 1:
        settings["learning_rate"] = found * args.learning_rate
        logger.info("below a head that starts solved learning_rate is %g", found * args.learning_rate)
    return float(found)


def set_rates(
    optimizer: torch.optim.Optimizer, model: nn.Module, paces: Mapping[str, Pace], times: float = 1.0
) -> None:
    """Divide the optimizer's groups, so that each parameter learns at its own rate; the fastest group comes first.

    Args:
        optimizer: before the first step, without a schedule.
        model: whose parameters it holds.
        paces: of parameters by name.
        times: the learning rate is taken so many times.

    Raises:
        RequestError: the optimizer does not hold a parameter that has a rate of its own.
    """
    for group in optimizer.param_groups if times != 1 else ():
        group["lr"] *= times
    parameters = dict(model.named_parameters())
    factors = {id(parameters[name]): entry.factor for name, entry in paces.items() if entry.factor != 1}
    if not factors:
        return
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        parts: dict[float, list[Any]] = {}
        for parameter in group["params"]:
            parts.setdefault(factors.pop(id(parameter), 1.0), []).append(parameter)
        groups += [{**group, "params": part, "lr": factor * group["lr"]} for factor, part in parts.items()]
    if factors:
        raise RequestError(
            message(
                f"{type(optimizer).__name__} takes no rate for each parameter",
                where="args: optim; layer_decay",
                remedy="Take optim='adamw_torch', or leave layer_decay out.",
            )
        )
    optimizer.param_groups[:] = sorted(groups, key=lambda group: -float(group["lr"]))


def let_join(model: nn.Module, paces: Mapping[str, Pace], epoch: float) -> None:
    """Let only those parameters take gradients, and steps, whose turn has come after `epoch` epochs."""
    parameters = dict(model.named_parameters())
    for name, entry in paces.items():
        parameters[name].requires_grad_(entry.start <= epoch)


@final
class Joining(TrainerCallback):
    """Lets parameters join epoch by epoch, and leaves the model as `adapt` made it."""

    def __init__(self, paces: Mapping[str, Pace]) -> None:
        self.paces = paces

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Those whose turn it is take gradients; a resumed run counts on from its checkpoint."""
        let_join(kwargs["model"], self.paces, int(state.epoch or 0))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All of them do."""
        let_join(kwargs["model"], self.paces, float("inf"))
