"""The contract of a run: every row teaches something, what was to train has moved, what was frozen has not."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from transformers import TrainerCallback

from adapters import finite, ranks, sharded, zero
from adapters.adapt import live_names
from adapters.anatomy import never_saved, own_name
from adapters.contracts import Adapted
from adapters.errors import ContractError, DataError, message
from adapters.likelihood import IGNORED
from adapters.shards import tensor_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.contracts import Task

logger = logging.getLogger(__name__)

STEPS = 3  # with a learning rate above 0, after which every trained tensor has moved or is known to stand rightly
NEGLIGIBLE = 1e-7  # share of the greatest gradient below which one is zero but for rounding (key biases)
DEAD = 0.5  # share of rows without anything to learn that a run may have
SHOWN = 8  # names or rows that a message lists
TOUCH = 0.1  # how far a tensor is moved to see whether the loss depends on it
FELT = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative change of the loss that is no rounding; else 5e-2


def some(names: Iterable[object]) -> str:
    """The first few names or row numbers, and how many more there are."""
    listed = list(map(str, names))
    return ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")


def digest(tensor: Tensor) -> str:
    """xxh3-128 over the bytes of a tensor; of a divided one over those of all parts, asked for by all processes."""
    own = _own_digest(tensor)
    return "".join(ranks.gathered(own)) if ranks.divided(tensor) else own


def _own_digest(tensor: Tensor) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(tensor_bytes(ranks.part(tensor)))


# ---------------------------------------------------------------------- before the run


def check_trained(adapted: Adapted) -> None:
    """What takes gradients is what `adapt` chose, and holds everything that loading made new.

    Raises:
        ContractError: naming the tensors.
    """
    parameters = dict(adapted.model.named_parameters())
    trained = set(adapted.trained)
    record = adapted.record
    new = set(live_names(adapted.model, set(record.new) - record.unread)) - never_saved(adapted.model)
    faults = {
        "newly initialised and not trained": new - trained,
        "to be trained, but take no gradient": {
            n for n in trained & set(parameters) if not parameters[n].requires_grad
        },
        "to be trained, but no longer in the model": trained - set(parameters),
        "frozen, but take gradients": {n for n, p in parameters.items() if p.requires_grad} - trained,
    }
    found = [f"{what}: {some(sorted(names))}" for what, names in faults.items() if names]
    if found:
        raise ContractError(
            message(
                "not the tensors that the strategy trains",
                where=f"strategy {adapted.strategy.name!r}",
                expected=f"{len(trained)} tensors",
                found="; ".join(found),
                remedy="Leave requires_grad as adapt set it.",
            )
        )


def check_rows(rows: Any, task: Task) -> str | None:
    """Count what each training row teaches; rows that teach nothing are named.

    Args:
        rows: prepared rows; those whose labels are made with the batch are not looked at.

    Returns:
        What is to be said, None where every row teaches something.

    Raises:
        DataError: more than half of the rows teach nothing.
    """
    kind = getattr(rows, "features", None) and rows.features.get("labels")
    inner = getattr(kind, "feature", None)
    if inner is None or not str(getattr(inner, "dtype", "")).startswith("int") or not hasattr(rows, "num_rows"):
        return None
    import numpy as np

    dead: list[int] = []
    table = rows.with_format("arrow")
    for begin in range(0, len(rows), 10_000):
        column = table[begin : begin + 10_000]["labels"]
        for chunk in column.chunks:
            lengths = np.asarray(chunk.value_lengths())
            learnt = np.concatenate([[0], np.cumsum(np.asarray(chunk.flatten()) != IGNORED)])
            ends = np.cumsum(lengths)
            counts = learnt[ends] - learnt[ends - lengths]
            for index in np.flatnonzero(counts <= 1):  # one may be a first token, which nothing foretells
                labels = torch.tensor(chunk[int(index)].as_py(), dtype=torch.long)
                if labels.numel() == 0 or task.items(labels[None]) == 0:
                    dead.append(begin + int(index))
            begin += len(chunk)
    if not dead:
        return None
    if len(dead) > DEAD * len(rows):
        raise DataError(
            message(
                "the rows teach nothing: every label of them is masked",
                where="train_dataset",
                expected=f"at most {DEAD:.0%} of {len(rows)} rows",
                found=f"{len(dead)}: rows {some(dead)}",
                remedy="Look at the labels, at max_length, and at what of a row is to be learnt.",
            )
        )
    return f"{len(dead)} of {len(rows)} training rows teach nothing, every label of them is masked: rows {some(dead)}"


# ---------------------------------------------------------------------- frozen bytes


def frozen(adapted: Adapted) -> dict[str, str]:
    """The digest of every tensor that does not train, saved buffers and packed weights included.

    Of tensors that only grew, the rows that the backbone brought; of divided ones, the part that this process holds.
    """
    state = adapted.model.state_dict()
    parameters = dict(adapted.model.named_parameters())
    seen = {ranks.part(parameters[name]).data_ptr() for name in adapted.trained}
    grown = adapted.vocabulary.axes if adapted.vocabulary is not None else {}
    found = {}
    for name, parameter in parameters.items():
        if own_name(name) in grown:
            others = torch.ones(parameter.shape[grown[own_name(name)]], dtype=torch.bool, device=parameter.device)
            others[adapted.added_ids(parameter)] = False
            kept = parameter.detach().index_select(grown[own_name(name)], others.nonzero().flatten())
            found[own_name(name)] = digest(kept)
    for name, tensor in state.items():
        held = ranks.part(tensor) if isinstance(tensor, torch.Tensor) else None
        if held is not None and held.numel() and held.data_ptr() not in seen:
            seen.add(held.data_ptr())
            found[own_name(name)] = _own_digest(held)
    return found


def check_frozen(before: Mapping[str, str], adapted: Adapted) -> None:
    """Nothing that was frozen has moved.

    Raises:
        ContractError: naming the tensors.
    """
    after = frozen(adapted)
    moved = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if sharded.is_divided(adapted):
        moved = sorted({name for said in ranks.gathered(moved) for name in said})
    if moved:
        raise ContractError(
            message(
                "frozen tensors changed while training went on",
                where=f"strategy {adapted.strategy.name!r}",
                expected="the bytes that they had when it began",
                found=f"{len(moved)} others: {some(moved)}",
                remedy="A callback, a hook or the model's own code wrote to them; the adapter does not hold them.",
            )
        )


# ---------------------------------------------------------------------- the first steps


def _greatest(gradient: Tensor) -> float:
    """The greatest entry of a gradient, without its sign, as far as this process holds it."""
    held = ranks.part(gradient)
    if not held.numel():
        return 0.0
    low, high = torch.aminmax(held)
    return max(-float(low), float(high))


@final
@dataclass
class _Watched:
    """A trained tensor that has not moved by a gradient yet."""

    steps: int = 0  # with a learning rate above 0
    reached: bool = False  # by autograd
    pulled: bool = False  # by a gradient that is not zero
    step: float = 0.0  # about as far as the last one could carry it: the learning rate, or less with SGD
    before: str = ""  # its digest before the step, or when it was given up


@final
class Contract(TrainerCallback):
    """Watches one run: each trained tensor until it has moved, the frozen ones from beginning to end.

    Args:
        adapted: what trains.
        loss: the loss of the last batch, in eval mode and without gradients.
        skipped: whether the optimizer left the last step out (a loss scale that was too great).
        say: takes what is to be said once.

    Attributes:
        good: the trained tensors as they were when the run began.

    Raises:
        ContractError: a trained tensor that autograd does not reach though the loss depends on it, that does not
            move though it has a gradient, or that no optimizer holds; frozen tensors that moved.
        NumbersError: a trained tensor that is not finite after a step.
    """

    def __init__(
        self, adapted: Adapted, loss: Callable[[], float], skipped: Callable[[], bool], say: Callable[[str], None]
    ) -> None:
        self._adapted, self._loss, self._skipped, self._say = adapted, loss, skipped, say
        self._parameters: dict[str, Tensor] = {}
        self._watched: dict[str, _Watched] = {}
        self._still: dict[str, tuple[str, str]] = {}  # name -> why it stands, its digest
        self._frozen: dict[str, str] = {}
        self._in_step: list[str] = []
        self._left_out = 0
        self._counted = 0
        self._taken = 0
        self.good: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take down what must stay; a checkpoint has been loaded by now."""
        check_trained(self._adapted)
        trained = set(self._adapted.trained)
        self._parameters = {name: p for name, p in self._adapted.model.named_parameters() if name in trained}
        self._watched = {name: _Watched() for name in self._parameters}
        self._frozen = frozen(self._adapted)
        self.good = {name: tensor.clone() for name, tensor in self._adapted.state().items()}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients of tensors that have not moved yet."""
        self._in_step = []
        if not self._watched:
            return
        engine = zero.of(kwargs["optimizer"])
        groups = kwargs["optimizer"].param_groups if engine is None else engine.pieces.whole()
        rates = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
        missing = [name for name in self._watched if id(self._parameters[name]) not in rates]
        if missing:
            raise ContractError(
                message(
                    "the optimizer does not hold what is to be trained",
                    where="optimizers",
                    expected=f"{len(self._parameters)} tensors",
                    found=f"{len(missing)} are missing: {some(missing)}",
                )
            )
        turn = [n for n in self._watched if self._parameters[n].requires_grad and rates[id(self._parameters[n])] > 0]
        gradients = {name: self._parameters[name].grad for name in turn}
        norms = {name: _greatest(gradient) for name, gradient in gradients.items() if gradient is not None}
        norms = norms if engine is None else engine.greatest()
        if engine is not None or any(map(ranks.divided, self._parameters.values())):
            said = ranks.gathered(norms)
            norms = {name: max(one.get(name, 0.0) for one in said) for name in turn if any(name in one for one in said)}
        floor = NEGLIGIBLE * max(norms.values(), default=0.0)
        for name in turn:
            entry = self._watched[name]
            entry.reached |= name in norms
            if norms.get(name, 0.0) > floor:
                entry.pulled = True
                entry.step = rates[id(self._parameters[name])] * min(1.0, norms[name])
                entry.before = digest(self._parameters[name])
            else:
                entry.before = ""
        self._in_step = turn

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See what moved, and that it is finite."""
        self._taken += 1
        if self._skipped():
            self._left_out += 1
            finite.check_scale(self._left_out, state.global_step + 1)
            return
        self._left_out = 0
        finite.check_weights(self._parameters, f"step {state.global_step + 1}")
        if not self._in_step:
            return
        self._counted += 1
        due = []
        for name in self._in_step:
            entry = self._watched[name]
            entry.steps += 1
            if entry.before and entry.before != digest(self._parameters[name]):
                del self._watched[name]
            elif entry.steps >= STEPS:
                due.append(name)
        if due or all(name not in self._watched for name in self._in_step):
            self._judge(due, [n for n in self._parameters if n not in self._watched and n not in self._still])
        self._in_step = []

    def finish(self, *, whole: bool = True) -> None:
        """The end of the run: judge what had too few steps, list what never moved, compare the frozen bytes.

        Args:
            whole: these are all steps of a run, not those up to an interruption or after one.

        Raises:
            ContractError: steps were taken and no trained tensor ever moved; or as said above.
        """
        joined = [name for name, entry in self._watched.items() if entry.steps]
        self._judge(joined, list(self._parameters))
        for why in sorted({why for why, _ in self._still.values()}):
            names = [n for n, (w, old) in self._still.items() if w == why and digest(self._parameters[n]) == old]
            if names:
                total = len(self._parameters)
                self._say(f"{len(names)} of {total} trained tensors did not move, {why}: {some(map(own_name, names))}")
        if not self._counted:
            self._say("no step had a learning rate above 0: nothing was trained")
        check_frozen(self._frozen, self._adapted)
        if not whole or not self._taken:
            return
        unmoved = len(self._watched) + sum(digest(self._parameters[n]) == old for n, (_, old) in self._still.items())
        if unmoved == len(self._parameters):
            reasons = {why for why, _ in self._still.values()} or {"no step had a learning rate above 0"}
            raise ContractError(
                message(
                    "the run trained nothing",
                    where=f"strategy {self._adapted.strategy.name!r}, {self._taken} steps",
                    expected="trained tensors that moved",
                    found=f"all {unmoved} as they were: {'; '.join(sorted(reasons))}",
                    remedy="Take more steps, a shorter warm-up (warmup_steps), a larger learning_rate, rows with "
                    "something to learn.",
                )
            )

    def solved(self) -> None:
        """The end of a run without steps: each trained tensor has other values, all finite; frozen bytes are the same.

        Raises:
            ContractError: what was to be solved did not move, or what was frozen did.
            NumbersError: a solved tensor that is not finite.
        """
        finite.check_weights(self._parameters, "the solved head")
        state = self._adapted.state()
        still = [name for name, tensor in state.items() if bool((tensor == self.good[name]).all())]
        if still:
            raise ContractError(
                message(
                    "tensors that were to be solved are as they were",
                    where=f"strategy {self._adapted.strategy.name!r}",
                    found=some(still),
                    remedy="Look at the rows: their labels do not depend on them, or all are the same.",
                )
            )
        check_frozen(self._frozen, self._adapted)

    def _judge(self, due: Sequence[str], moved: Sequence[str]) -> None:
        """Of tensors that have not moved: which stand rightly, which are at fault."""
        faults: dict[str, list[str]] = {}
        unreached = [name for name in due if not self._watched[name].reached]
        dependent = self._felt(unreached) if unreached else []
        for name in due:
            entry, tensor = self._watched.pop(name), self._parameters[name]
            if name in dependent:
                faults.setdefault("the loss depends on them, but autograd does not reach them", []).append(name)
                continue
            if not entry.reached:
                why = "the loss does not depend on them: left as they were"
            elif not entry.pulled:
                why = "their gradient is zero"
            elif entry.step < torch.finfo(tensor.dtype).eps * float(ranks.whole(tensor.detach().abs().max())):
                why = f"steps as small as these are rounded away in {str(tensor.dtype).removeprefix('torch.')}"
            else:
                faults.setdefault("they have a gradient, but the steps do not move them", []).append(name)
                continue
            self._still[name] = why, digest(tensor)
        grown = self._adapted.vocabulary.axes if self._adapted.vocabulary is not None else {}
        body = [n for n in due if own_name(n) not in self._adapted.head and own_name(n) not in grown]
        if due and not moved and self._counted >= STEPS and len(self._still) == len(self._parameters):
            faults["nothing moves at all"] = list(due)
        if not faults and len(body) > 1 and not set(moved) - self._adapted.head and self._counted >= STEPS:
            faults["nothing but the head moves"] = body
        if faults:
            raise ContractError(
                message(
                    "tensors that are to be trained do not move",
                    where=f"strategy {self._adapted.strategy.name!r}, {self._counted} steps",
                    expected="every trained tensor reached by autograd, and moved",
                    found="; ".join(f"{what}: {len(n)}, {some(map(own_name, n))}" for what, n in faults.items()),
                    remedy="Look for detached outputs, hooks, a reentrant activation checkpointing, a learning rate "
                    "that is far too small.",
                )
            )

    def _felt(self, names: Sequence[str]) -> list[str]:
        """Of these tensors, the ones that the loss depends on: they are moved, and the loss is computed again.

        Experts that no row was routed to, a mask token where nothing is masked: the loss stays as it is.
        """
        usual = self._loss()
        bound = FELT.get(self._adapted.model.dtype, 5e-2) * max(abs(usual), 1e-6)

        def search(part: Sequence[str]) -> list[str]:
            if abs(self._moved_loss(part) - usual) <= bound:
                return []
            if len(part) == 1:
                return list(part)
            middle = len(part) // 2
            return search(part[:middle]) + search(part[middle:]) or list(part)

        return search(names)

    def _moved_loss(self, names: Sequence[str]) -> float:
        kept = {name: self._parameters[name].detach().clone() for name in names}
        generator = torch.Generator().manual_seed(0)
        try:
            with torch.no_grad():
                for name, old in kept.items():
                    spread = ranks.whole(old.float().square().mean()).sqrt().to(old.dtype)
                    noise = torch.randn(old.shape, generator=generator).to(old.dtype).to(ranks.part(old).device)
                    self._parameters[name].add_(ranks.laid(noise * (TOUCH + spread), old))
                found = self._loss()
        finally:
            with torch.no_grad():
                for name, old in kept.items():
                    self._parameters[name].copy_(old)
        return found if math.isfinite(found) else math.inf
