"""How a new output layer begins: solved on the frozen backbone's features, before or instead of any step.

Where nothing but the output layer trains, the solved one is the result, read where it does best on validation rows.
Everywhere else it is the start (linear probing, then fine-tuning: Kumar et al., 2022).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, TypeGuard, final

import torch
from torch import Tensor
from transformers import TrainerCallback

from adapters import (
    data,
    exchange,
    features,
    featurestore,
    heads,
    interrupts,
    neighbours,
    pooling,
    progress,
    ranks,
    reading,
    relocation,
    solve,
)
from adapters.anatomy import block_lists, own_name
from adapters.contracts import Adapted, Draw
from adapters.errors import RequestError
from adapters.featurestore import Features, Known
from adapters.memory import free_memory
from adapters.options import field_names
from adapters.prefix import batches, row_keys
from adapters.progress import Job
from adapters.reading import OWN, Reading

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

GAIN: Final = 1 / 4  # of the blind loss that a start has to take away (measured: docs/benchmarks.md, "Warm heads")
# Of a start: how far its answers would move if every feature changed by its own size at random, as a multiple of how
# far they lie apart. About 1 to 3 where features tell rows apart; over 100 where all rows have nearly the same, and
# weights live on what is left: the first steps of training would throw such a start far off.
STRAIN: Final = 10.0
STARTS: Final = (1.0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4)  # penalties, on features with a root mean square of 1
# Of the blind loss, left on the training rows: solved weights tell these rows apart so surely that hardly a gradient
# remains for what lies below (measured: docs/benchmarks.md, "What a start leaves to learn"). So training begins from
# the same answers, less sure: from a share of the solved weights.
LEFT: Final = 1 / 2
WARM_ROWS: Final = 10_000  # training rows that a start is solved on at most; a probe takes all
HELD_ROWS: Final = 2_000  # validation rows that choose a start at most
BUDGET: Final = 3  # a third of the free memory may be taken by features


@final
@dataclass(frozen=True)
class Rows:
    """The rows of a run.

    Attributes:
        train: prepared, with a column "length".
        held: validation rows, likewise; None for none.
        collate: a batch of some rows, as evaluation has them; with a draw as training has them.
        device: where the model computes.
        computing: around every forward pass (autocast).
        seed: of the choice of rows.
        draw: what is random about a training row.
        cache: whose features are kept for later runs, and how many of them on disk (see `kept.opened`); empty for none.
        known: from runs before over the same rows.
    """

    train: Any
    held: Any
    collate: Callable[..., dict[str, Any]]
    device: torch.device
    computing: Callable[[], contextlib.AbstractContextManager[Any]]
    seed: int
    draw: Draw
    cache: Mapping[str, Any]
    known: Known

    def batches(self, rows: Any, most: int | None) -> Iterator[dict[str, Any]]:
        """Batches of like length; of more rows than `most` a seeded sample."""
        lengths = rows["length"][:]
        picks = list(range(len(lengths)))
        if most is not None and len(picks) > most:
            order = torch.randperm(len(picks), generator=torch.Generator().manual_seed(self.seed))
            picks = sorted(order[:most].tolist())
        for indices in batches([lengths[pick] for pick in picks]):
            yield self._batch(self.collate(data.at(rows, [picks[index] for index in indices])))

    def counted(self, rows: Any, most: int | None) -> Iterator[dict[str, Any]]:
        """The same; when the next batch is asked for, the last one counts as done for the job at hand."""
        for batch in self.batches(rows, most):
            yield batch
            progress.count(len(batch["labels"]))

    def first(self) -> dict[str, Any]:
        """The first training rows."""
        return self._batch(self.collate(self._few()))

    def vary(self) -> bool:
        """Whether a training row is drawn anew in each epoch."""
        plain, drawn = self.collate(self._few()), self.collate(self._few(), draw=Draw(self.draw.seed, 1))
        return any(
            isinstance(value, Tensor) and not (drawn[name].shape == value.shape and bool((drawn[name] == value).all()))
            for name, value in plain.items()
        )

    def _few(self) -> list[Any]:
        return data.at(self.train, range(min(3, len(self.train))))

    def _batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch.pop("row", None)
        return {n: v.to(self.device) if isinstance(v, Tensor) else v for n, v in batch.items()}


@final
@dataclass(frozen=True)
class Start:
    """A new output layer, solved.

    Attributes:
        layer: the live layer that it is for.
        choice: what was solved, and what it was chosen among.
        readings: of the candidates, in their order.
        probe: nothing but this layer would train.
        seconds: that features and solution took.
        strain: see `STRAIN`.
        share: of its weights that training begins from; see `LEFT`.
    """

    layer: nn.Linear
    choice: solve.Choice
    readings: tuple[Reading, ...]
    probe: bool
    seconds: float
    strain: float
    share: float = 1.0

    def put(self, share: float = 1.0) -> None:
        """Give the live layer the solved values, or a share of them."""
        found = self.choice.layer
        with torch.no_grad():
            self.layer.weight.copy_(share * found.weight)
            bias: Tensor | None = self.layer.bias
            if bias is not None:
                bias.copy_(share * found.bias)


@final
class AtStart(TrainerCallback):
    """Measures the solved head as one of the weights that may prove best, and lets training begin from a share of it.

    Args:
        start: in place already.
        measure: None where nothing is evaluated.
    """

    def __init__(self, start: Start, measure: Callable[[], Any] | None) -> None:
        self._start, self._measure = start, measure

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step."""
        if self._measure is not None:
            self._measure()
        if self._start.share < 1:
            self._start.put(self._start.share)


def is_start(start: Start | None) -> TypeGuard[Start]:
    """Whether steps begin from a solved head: a probe has none."""
    return start is not None and not start.probe


def at_start(start: Start | None, measure: Callable[[], Any] | None) -> list[TrainerCallback]:
    """What is done with a solved head when the steps begin."""
    return [AtStart(start, measure)] if is_start(start) else []


def new_layer(adapted: Adapted, rows: Rows) -> nn.Linear | None:
    """The output layer, where it is as `adapt` made it and its task's loss is one over its outputs; else None."""
    if not heads.is_new(adapted):
        return None
    batch = rows.first()
    if batch.pop("labels", None) is None:
        return None
    with rows.computing():
        layer = features.output_layer(adapted.model, batch)
    names = {own_name(name) for name, p in adapted.model.named_parameters() if layer and _belongs(p, layer)}
    return layer if names and names <= set(adapted.record.first) else None


def _belongs(parameter: Tensor, layer: nn.Module) -> bool:
    return any(parameter is own for own in layer.parameters(recurse=False))


def places(adapted: Adapted, layer: nn.Linear) -> tuple[Reading, ...]:
    """Where a probe of this layer alone may read, the task's own options held to; empty where more than it trains."""
    model, task = adapted.model, adapted.record.task or adapted.task
    fixed = reading.of(task)
    known = field_names(type(task))
    parameters = dict(model.named_parameters())
    rest = {own_name(name) for name in adapted.trained if not _belongs(parameters[name], layer)}
    poolings: tuple[str, ...] = (OWN,)
    unread: frozenset[str] = frozenset()
    if "pooling" in known and task.pooling is None:  # type: ignore[attr-defined]
        pictures = model.main_input_name == "pixel_values"
        offered = reading.OF_PICTURES if pictures else reading.POOLINGS
        with contextlib.suppress(RequestError):
            unread = pooling.planned(model, Reading("mean", fixed.layer)).unread
            poolings = offered
    if rest:
        poolings = tuple(one for one in poolings if one != OWN) if rest <= unread else ()
    layers: list[int | None] = [None]
    lists = block_lists(model)
    if fixed.layer is None and len(lists) == 1 and not lists[0].shared and lists[0].length > 1:
        with contextlib.suppress(RequestError):
            pooling.planned(model, replace(fixed, layer=1))
            layers += range(lists[0].length - 1, 0, -1)
    return tuple(Reading(one, depth) for depth in layers for one in poolings)


def begun(adapted: Adapted, rows: Rows, *, probe: bool, wanted: bool | None) -> tuple[Start | None, list[str]]:
    """The new output layer of a run, solved, and the live head in the place where it reads; with what is to be said.

    A probe's layer is given back to be put in place when the run has begun, a start is in place already. None where the
    head is not new, or where it starts cold.

    Args:
        adapted: as `adapt` left it.
        rows: of the run.
        probe: where nothing else trains, it is solved instead of stepped.
        wanted: a start is wanted or not; None where it helps.
    """
    sets = [part for part in (rows.train, rows.held) if part is not None]
    known = all("length" in (getattr(part, "column_names", None) or ()) and len(part) for part in sets)
    layer = new_layer(adapted, rows) if known and (probe or wanted is not False) else None
    if layer is None:
        return None, []
    said: list[str] = []
    readings = places(adapted, layer) if probe else ()
    if readings and rows.vary():
        readings = ()
        said.append("the probe is stepped, not solved: its training rows are drawn anew in each epoch")
    if not readings and wanted is False:
        return None, said
    # Solved once, so that every process begins with the same bits.
    if ranks.joined():
        _read_apart(adapted, rows, layer, readings)
    made = ranks.by_first(lambda: solved(adapted, rows, layer, readings))
    start, remark = made if made is not None and not ranks.joined() else _told(made, layer)
    said += [remark] if remark else []
    if start is None:
        return None, said
    choice = start.choice
    best = choice.tried[0]
    on = "the validation rows" if rows.held is not None else "training rows that were held back"
    if start.probe:
        read = moved(adapted, start)
        said.append(
            f"the probe is solved, not stepped: it reads {read}, L2 penalty {choice.layer.penalty:g}, "
            f"{_score(choice, best)} on {on}; {_others(start)}"
        )
        return start, said
    gain = 1 - best.loss / choice.blind if choice.blind > 0 else 0.0
    adapted.record.metrics["start"] = {
        "score": best.score,
        "loss": best.loss,
        "gain": gain,
        "penalty": choice.layer.penalty,
        "strain": start.strain,
        "share": start.share,
        "warm": float(gain >= GAIN and start.strain <= STRAIN),
    }
    if wanted is None and not (gain >= GAIN and start.strain <= STRAIN):
        logger.info(
            "the head starts cold: solved as things are, %s on %s, it takes away %.0f %% of the blind loss%s",
            *(_score(choice, best), on, 100 * gain),
            f", by small differences between large features (strain {start.strain:.0f})" if gain >= GAIN else "",
        )
        return None, said
    start.put()
    logger.info(
        "the head starts solved: %s on %s (L2 penalty %g, %.0f %% of the blind loss taken away, %.1f s)%s",
        *(_score(choice, best), on, choice.layer.penalty, 100 * gain, start.seconds),
        f"; training begins from {start.share:.2f} of its weights" if start.share < 1 else "",
    )
    return start, said


def _told(made: tuple[Start | None, str] | None, layer: nn.Linear) -> tuple[Start | None, str]:
    """What the first process has solved, in all of them.

    Args:
        made: by the first process; None in the others.
        layer: of this process.
    """
    start, remark = made or (None, "")
    facts: Any = None
    if start is not None:
        facts = dataclasses.asdict(replace(start, layer=None, choice=replace(start.choice, layer=None)))  # type: ignore[arg-type]
        facts["shapes"] = [list(part.shape) for part in (start.choice.layer.weight, start.choice.layer.bias)]
        facts["penalty"] = start.choice.layer.penalty
    facts, remark = ranks.told([facts, remark])
    if facts is None:
        return None, remark
    parts = [torch.zeros(shape, dtype=torch.float64) for shape in facts["shapes"]]
    if start is not None:
        parts = [start.choice.layer.weight.double(), start.choice.layer.bias.double()]
    exchange.told_tensors(parts)
    weight, bias = (part.to(layer.weight) for part in parts)
    tried = tuple(solve.Tried(**one) for one in facts["choice"]["tried"])
    solution = solve.Solved(weight, bias, facts["penalty"])
    choice = solve.Choice(**{**facts["choice"], "layer": solution, "tried": tried})
    places = tuple(Reading(**one) for one in facts["readings"])
    return Start(layer, choice, places, *(facts[name] for name in ("probe", "seconds", "strain", "share"))), remark


def solved(adapted: Adapted, rows: Rows, layer: nn.Linear, readings: tuple[Reading, ...]) -> tuple[Start | None, str]:
    """The output layer at its best penalty, and of a probe in its best place; nothing of the model changes.

    Args:
        adapted: as `adapt` left it.
        rows: of the run.
        layer: its new output layer.
        readings: where a probe may read; none for the start of a layer that reads where it reads.
    """
    began = time.monotonic()
    alone, remark = bool(readings), ""
    readings = readings or (Reading(),)
    width, room = 4 * layer.in_features * len(rows.train), free_memory() // BUDGET
    if len(readings) > 1 and width * len(readings) > room:
        tried = readings[:: -(-len(readings) // max(1, room // width))]
        remark = f"{len(tried)} of {len(readings)} places to read are tried: more features would not fit into memory"
        readings = tried
    extract = features.Extract(adapted.model, layer, readings)
    most = (None, None) if alone else (WARM_ROWS, HELD_ROWS)
    parts = zip((rows.train, rows.held or ()), most, strict=True)
    sizes = [min(len(part), limit or len(part)) for part, limit in parts]
    with rows.computing():
        states = featurestore.opened(adapted, layer, readings, rows.device, rows.cache)

        def read() -> Features | None:
            with Job("reading features", sum(sizes), "rows"), interrupts.leaving(states.left):
                own, held = features.of_rows(extract, rows.counted(rows.train, most[0]), states, row_keys), None
                if rows.held is not None:
                    held = features.of_rows(extract, rows.counted(rows.held, most[1]), states, row_keys)
            finite = all(bool(torch.isfinite(part).all()) for part in (own[0], *(held or ())[:1]))
            return (own, held) if finite else None

        choosing = (most, rows.seed if sizes != [len(rows.train), len(rows.held or ())] else None)
        of = (states.folder, rows.train, rows.held, choosing)
        found = rows.known.features(of, read)
        states.flush()
    if found is None:
        return None, "nothing is solved: the backbone's features are not finite"
    (train, labels), held = found
    task: Any = adapted.record.task or adapted.task

    def loss(logits: Tensor, targets: Tensor, items: int) -> Tensor:
        total: Tensor = task.loss(SimpleNamespace(logits=logits), targets, items)
        return total

    bias = layer.bias is not None
    # A start must bear that the features change: no weight may live on a small difference between large numbers.
    how: dict[str, Any] = {} if alone else {"even": True, "penalties": STARTS}

    def solving() -> solve.Choice:
        with Job("solving the head", len(STARTS if not alone else solve.PENALTIES), "penalties"):
            return solve.chosen(
                train,
                labels,
                loss,
                layer.out_features,
                items=task.items,
                held=held,
                bias=bias,
                seed=rows.seed,
                turns=rows.known.turned(train),
                **how,
            )

    # Rows that choose leave nothing to the seed, which divides the training rows where there are none.
    terms = [task, layer.out_features, bias, how, None if held is not None else rows.seed]
    choice = rows.known.choice(of, terms, solving)
    own = train[:, choice.place]
    share = 1.0
    if choice.counted and not alone:
        share = solve.softened(choice.layer, own, labels, loss, task.items(labels), LEFT * choice.blind)
    spent = time.monotonic() - began
    return Start(layer, choice, readings, alone, spent, _strain(choice.layer, own), share), remark


def _read_apart(adapted: Adapted, rows: Rows, layer: nn.Linear, readings: tuple[Reading, ...]) -> None:
    """Let every process that shares the first one's disk read a part of the features; they are solved from there.

    Where no disk keeps them the first process reads them all.
    """
    alone = bool(readings)
    readings = readings or (Reading(),)
    states = exchange.in_all(lambda: featurestore.opened(adapted, layer, readings, rows.device, rows.cache))
    group = neighbours.sharing(states.folder)
    turn = group.index(ranks.rank())

    def read() -> None:
        extract = features.Extract(adapted.model, layer, readings)
        limits = (None, None) if alone else (WARM_ROWS, HELD_ROWS)
        for part, most in zip((rows.train, rows.held), limits, strict=True):
            for number, batch in enumerate(rows.batches(part, most) if part is not None else ()):
                if number % len(group) == turn:
                    features.of_rows(extract, [batch], states, row_keys)
        states.flush()

    if len(group) > 1:
        with rows.computing(), Job("reading features"):
            exchange.in_all(read)


def _strain(layer: solve.Solved, read: Tensor) -> float:
    """How far the answers of a layer move with its features, against how far they lie apart; see `STRAIN`."""
    size = read.square().mean().sqrt()
    apart = layer.logits(read).std(0, unbiased=False)
    return float(layer.weight.norm() * size / apart.norm().clamp_min(1e-30))


def _score(choice: solve.Choice, one: solve.Tried) -> str:
    return f"accuracy {one.score:.3f}" if choice.counted else f"loss {one.loss:.4g}"


def _others(start: Start) -> str:
    """What the other candidates came to."""
    choice = start.choice
    shown = [f"{start.readings[one.place]} {_score(choice, one)}" for one in choice.tried[1:]]
    tried = f"of {len(start.readings)} places"
    return f"{tried}, next {', '.join(shown)}" if shown else "no other place was tried"


def moved(adapted: Adapted, start: Start) -> Reading:
    """Let the head read where the probe was solved; what the task fixed stays."""
    chosen = start.readings[start.choice.place]
    fixed = reading.of(adapted.record.task or adapted.task)
    wanted = Reading(chosen.pooling if chosen.pooling != OWN else fixed.pooling, chosen.layer or fixed.layer)
    if wanted != fixed:
        relocation.move(adapted, None if wanted.plain else wanted.pooling, wanted.layer)
    return wanted
