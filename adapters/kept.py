"""Which rows' frozen prefix a run keeps, and whether that pays.

What is kept lies in a folder of its own under the user's cache, named after everything that decides the numbers (see
`origin`), so that a later run on the same rows computes nothing below the cut: another seed, head, learning rate or
strategy with the same cut.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
import torch
from torch import Tensor

from adapters import data, exchange, interrupts, neighbours, origin, ranks
from adapters.forms import Form
from adapters.prefix import Cut, Prefix, batches, cut_of, unpadded
from adapters.progress import Job
from adapters.states import States, cache_folder, room_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from adapters.contracts import Adapted

logger = logging.getLogger(__name__)

# By a set's id: the set, and what its rows are known by, by their place.
Names = dict[int, tuple[Any, dict[int, bytes]]]

FORM: Final = "form.json"  # beside the states: what the modules below the cut return
AGAIN: Final = "the frozen prefix is computed in every epoch"
KEY: Final = 16  # bytes of what a row is known by
AGAIN_LATER: Final = 2.0  # passes of rows that this run passes once, and the next one takes up
READING: Final = 0.05  # of computing a row's states: what reading them takes, at most


@final
@dataclass(frozen=True)
class Request:
    """What the cache of a run is made of.

    Attributes:
        sets: prepared rows, each with a column "length"; the training rows first.
        passes: how often each of them is passed; nothing is kept of a set that never is.
        collate: a batch of a set's features; the flag asks for the training rows' random draw.
        redraw: moves that draw to another epoch and back: whether the rows are the same in every epoch is tried.
        dtype: of the kept states; None for the model's own.
        device: where the model computes.
        noisy: dropout is asked for in the frozen part.
        fingerprint: of the backbone.
        gigabytes: that kept states of all runs may take on disk; None for the smaller of 10 and a tenth of what is
            free, 0 for memory only.
        say: takes what is to be said, once each.
        names: what rows are known by that were looked at before, in this run or in others that share it.
    """

    sets: Sequence[Any]
    passes: Sequence[float]
    collate: Callable[[Sequence[Mapping[str, Any]], bool], dict[str, Any]]
    redraw: Callable[[int], None]
    dtype: torch.dtype | None
    device: torch.device
    noisy: bool
    fingerprint: str
    gigabytes: float | None
    say: Callable[[str], None]
    names: Names = field(default_factory=dict)

    def batch(self, features: Sequence[Mapping[str, Any]], *, training: bool) -> dict[str, Any]:
        """Model inputs on the model's device."""
        made = self.collate(features, training)
        made.pop("row", None)
        return {name: v.to(self.device) if isinstance(v, Tensor) else v for name, v in made.items()}


def folder_of(digest: str) -> Path:
    """Where states of this origin lie."""
    return cache_folder() / "holdfast" / "prefix" / digest


def opened(
    model: PreTrainedModel,
    path: str,
    *,
    fingerprint: str,
    dtype: torch.dtype | None,
    device: torch.device,
    gigabytes: float | None,
    say: Callable[[str], None],
    more: str = "",
    apart: Collection[str] = (),
    silent: Collection[str] = (),
) -> States:
    """What is kept of a model's states at a module; in memory only where they cannot be named, or no disk is wanted.

    Args:
        model: the live model.
        path: the module whose output (or what enters it) is kept.
        fingerprint: of the backbone.
        dtype: of what is kept; None for the model's own.
        device: where the model computes.
        gigabytes: on disk, see `Request`.
        say: takes what is to be said.
        more: what else tells these states from others.
        apart: modules that do not count.
        silent: modules whose adapters change nothing yet.
    """
    if gigabytes == 0:
        return States(None, 0, say=say)
    digest, why = origin.of(
        model,
        path,
        fingerprint=fingerprint,
        kept=dtype,
        device=device,
        more=more,
        apart=frozenset(apart),
        silent=frozenset(silent),
    )
    if not digest:
        logger.info("kept states stay in memory: %s", why)
        return States(None, 0, say=say)
    try:
        folder = folder_of(digest)
        budget = room_for(folder, gigabytes)
    except (OSError, RuntimeError) as fault:
        logger.info("kept states stay in memory: no cache folder (%s)", fault)
        return States(None, 0, say=say)
    return States(folder, budget, say=say)


def kept(model: PreTrainedModel, trained: Sequence[str], request: Request) -> tuple[Prefix | None, str]:
    """Every row's frozen prefix, and what is to be said of it.

    Nothing is kept where the rows vary from epoch to epoch, where the model cannot be cut, where neither memory nor
    disk would hold it, or where it would not pay: then the model computes everything in every epoch.
    """
    cut = cut_of(model, trained)
    if cut is None:
        return None, ""
    if request.noisy:
        return None, f"{AGAIN}: frozen_dropout asks for dropout in it"
    if any("length" not in (getattr(part, "column_names", None) or ()) for part in request.sets):
        return None, f"{AGAIN}: rows that come one by one, or prepared without a column 'length', are not kept"
    rows = request.sets[0]
    lengths = [part["length"][:] for part in request.sets]
    ends = sorted(range(len(rows)), key=lambda row: lengths[0][row])
    picks = sorted({ends[0], ends[len(ends) // 2], ends[-1]})
    some = data.at(rows, picks)
    first = request.batch(some, training=True)
    request.redraw(1)
    second = request.batch(some, training=True)
    request.redraw(0)
    trial = Prefix(model, cut, request.dtype)
    if trial.keys(first) != trial.keys(second):
        return None, f"{AGAIN}: the training rows are drawn anew in each"
    states = opened(
        model,
        cut.path,
        fingerprint=request.fingerprint,
        dtype=request.dtype,
        device=request.device,
        gigabytes=request.gigabytes,
        say=request.say,
    )
    form, why = _worth(model, cut, trial, states, request, lengths, picks, first)
    # Processes may have other rooms and other earlier runs: none keeps what another does not.
    reasons = [reason for reason in ranks.gathered(why) if reason is not None]
    if reasons:
        return None, reasons[0]
    prefix = Prefix(model, cut, request.dtype, states, form)
    found = _filled(prefix, request, lengths)
    if form is not None and not _write_form(states.folder, form):
        logger.info("kept states: their form was not written, the next run computes them again")
    _say_what(prefix, model, cut, request, found)
    return prefix, ""


def of_rows(
    adapted: Adapted, rows: Any, passes: float, gigabytes: float | None = None, names: Names | None = None
) -> Prefix | None:
    """The frozen prefix of prepared rows that are evaluated more than once, in other runs too; None for none.

    Args:
        adapted: what is evaluated.
        rows: prepared, with a column "length".
        passes: how often they are.
        gigabytes, names: see `Request`.
    """

    def collate(some: Sequence[Mapping[str, Any]], training: bool) -> dict[str, Any]:
        return adapted.task.collate(some, adapted.model, adapted.processor)

    request = Request(
        sets=[rows],
        passes=[passes],
        collate=collate,
        redraw=lambda epoch: None,
        dtype=None,
        device=adapted.model.device,
        noisy=False,
        fingerprint=adapted.fingerprint.digest,
        gigabytes=gigabytes,
        say=logger.info,
        names={} if names is None else names,
    )
    return kept(adapted.model, adapted.trained, request)[0]


def _worth(
    model: PreTrainedModel,
    cut: Cut,
    trial: Prefix,
    states: States,
    request: Request,
    lengths: Sequence[Sequence[int]],
    picks: Sequence[int],
    first: Mapping[str, Any],
) -> tuple[Form | None, str | None]:
    """The form of what is kept; and why nothing is, None for no reason, empty for one that need not be said."""
    if not len(states) and max(request.passes) < 1 / (1 - READING):
        return None, ""  # one pass, and nothing to begin with
    form = _read_form(states.folder)
    if form is None or len(form.passed) != len(cut.passed):
        fault = trial.fault(first)
        if fault:
            return None, f"{AGAIN}: {type(model).__name__} cannot be cut ({fault})"
        form = trial.form
    counted = sum(lengths[0][index] for index in picks)
    passed = [sum(sizes) for sizes, often in zip(lengths, request.passes, strict=True) if often]
    needed = trial.nbytes * sum(passed) // max(1, counted)
    if needed > states.memory and (states.folder is None or needed > states.budget):
        return None, (
            f"{AGAIN}: keeping it would take about {needed / 1e9:.1f} GB, more than half of the free memory "
            f"({states.memory / 1e9:.1f} GB) and more than prefix_cache_gb allows on disk "
            f"({states.budget / 1e9:.1f} GB)"
        )
    return form, None


def passes(args: TrainingArguments, rows: Any, held: int, *, evaluates: bool, steps: bool) -> list[float]:
    """How often a run passes its training rows and each of so many sets of validation rows, about.

    A run without steps passes the validation rows once; the next one takes them up.
    """
    if not steps:
        return [0.0, *[AGAIN_LATER] * held]
    found = float(args.num_train_epochs)
    if args.max_steps > 0 and hasattr(rows, "__len__"):
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        found = args.max_steps * step / max(1, len(rows))
    each_epoch = str(getattr(args.eval_strategy, "value", "no")) == "epoch"
    return [found, *[found if each_epoch else max(1.0, found) if evaluates else 0.0] * held]


def _filled(prefix: Prefix, request: Request, lengths: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Compute what is missing; how many rows there are, and how many were there already.

    Processes whose states lie in one folder compute every n-th batch each, and read what the others have written.
    """
    states = prefix.states
    group = neighbours.sharing(states.folder)
    turn, total, old = group.index(ranks.rank()), 0, 0
    rows = sum(len(sizes) for sizes, often in zip(lengths, request.passes, strict=True) if often)
    with Job("computing the frozen prefix", rows, "rows") as job, interrupts.leaving(states.left):
        found = []
        for number, sizes in enumerate(lengths):
            own = batches(sizes)[turn :: len(group)] if request.passes[number] else []
            found.append(exchange.in_all(lambda n=number, mine=own: _computed(prefix, request, n, mine, job)))  # type: ignore[misc]
        states.flush()
        if len(group) > 1:
            ranks.wait()
            states.look_again()
        for number, (part, sizes) in enumerate(zip(request.sets, lengths, strict=True)):
            if not request.passes[number]:
                continue
            mine = found[number]
            there = exchange.arrays(np.array(mine.numbers, dtype=np.int64))
            keys = exchange.arrays(np.frombuffer(b"".join(mine.keys), dtype=np.uint8).reshape(-1, KEY))
            unpadded_all = all(ranks.gathered(mine.unpadded))
            known = {
                int(row): key.tobytes()
                for member in (group if len(keys) > 1 else [0])
                for row, key in zip(there[member], keys[member], strict=True)
            }
            total, old = total + len(known), old + mine.old
            if len(group) > 1:
                _made_up(prefix, request, number, batches(sizes), known)
            if "row" in part.column_names and unpadded_all and len(known) == len(sizes):
                numbers = part["row"][:]
                prefix.know(part, {int(numbers[index]): key for index, key in known.items()})
    return total, sum(ranks.gathered(old)[member] for member in group) if len(group) > 1 else old


@final
@dataclass
class _Part:
    """What a process has computed of a set: the places of its rows, their keys, and how many were there already."""

    numbers: list[int]
    keys: list[bytes]
    old: int = 0
    unpadded: bool = True


def _computed(prefix: Prefix, request: Request, number: int, own: Sequence[Sequence[int]], job: Job) -> _Part:
    """Keep the rows of some batches of a set; those that are known and kept already are not made again."""
    found = _Part([], [])
    names = _names(prefix, request, number, own)
    for indices in own:
        keys = [names[index] for index in indices if index in names]
        if len(keys) == len(indices) and all(key in prefix.states for key in keys):
            found.old += len(indices)
        else:
            inputs = request.batch(data.at(request.sets[number], indices), training=number == 0)
            found.old += sum(key in prefix.states for key in prefix.keys(inputs))
            keys = prefix.add(inputs)
            found.unpadded = found.unpadded and unpadded(inputs)
            if unpadded(inputs):  # others are known with their padding, which is another in another batch
                names.update(zip(indices, keys, strict=True))
        found.keys += keys
        found.numbers += indices
        job.advance(len(indices))
    return found


def _names(prefix: Prefix, request: Request, number: int, own: Sequence[Sequence[int]]) -> dict[int, bytes]:
    """What the rows of a set were known by before, where the first of them is known by the same now; to be filled."""
    if not own:
        return {}
    rows, first = request.sets[number], own[0][0]
    known, names = request.names.get(id(rows), (None, {}))
    if known is rows and first in names:
        now = prefix.keys(request.batch([rows[first]], training=number == 0))
        if now == [names[first]]:
            return names
    names = {}
    request.names[id(rows)] = rows, names
    return names


def _made_up(
    prefix: Prefix, request: Request, number: int, every: Sequence[Sequence[int]], known: Mapping[int, bytes]
) -> None:
    """Compute what another process could not write, as far as there is room here."""
    for indices in every:
        if all(known[index] in prefix.states for index in indices):
            continue
        before = len(prefix.states)
        prefix.add(request.batch(data.at(request.sets[number], indices), training=number == 0))
        if len(prefix.states) == before:
            return


def _say_what(prefix: Prefix, model: PreTrainedModel, cut: Cut, request: Request, found: tuple[int, int]) -> None:
    if not logger.isEnabledFor(logging.INFO):
        return
    total, old = found
    below = origin.weights(model, origin.below(model, cut.path))
    every = max(1, origin.weights(model, [path for path, _ in model.named_modules()]))
    where = "in memory" if prefix.states.folder is None else str(prefix.states.folder)
    logger.info(
        "the frozen prefix up to %s is kept: %d rows (%d of them from earlier runs), %.1f MB, %s; it is %.0f %% of the "
        "matrices of a forward pass, which the run makes %g times",
        *(cut.path, total, old, prefix.nbytes / 1e6, where, 100 * below / every, max(request.passes)),
    )


# ---------------------------------------------------------------------- the form


def _read_form(folder: Path | None) -> Form | None:
    """The form that an earlier run has taken down; None where it has to be tried."""
    if folder is None:
        return None
    try:
        return Form.from_json(json.loads((folder / FORM).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        return None


def _write_form(folder: Path | None, form: Form) -> bool:
    if folder is None or (folder / FORM).exists():
        return True
    stage = folder / f".{secrets.token_hex(8)}.staging"
    try:
        stage.write_text(json.dumps(form.to_json()), encoding="utf-8")
        os.replace(stage, folder / FORM)
    except OSError:
        return False
    return True
