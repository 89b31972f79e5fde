"""`plan()`: what a run would take, before a byte of the backbone's weights is read.

Every strategy is resolved and applied as `adapt` does it, on a copy without memory; a run over it is then made on
tensors without memory, and counted (see `activations`). What does not fit this model stands in the table with its
reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from adapters import loadoptions
from adapters.adapt import STRATEGIES, requested
from adapters.budget import MARGIN, MOST, Line, Plan
from adapters.devices import Device
from adapters.devices import device as found_device
from adapters.engines import DDP, FSDP, Share, alone, chosen, divided, replicated, stepping, units
from adapters.errors import AdaptersError, RequestError, message
from adapters.processes import fsdp

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from adapters.activations import Batch, Imitation
    from adapters.blueprint import Blueprint
    from adapters.contracts import Adapted, Strategy, Task
    from adapters.trial import Trial

LENGTH: Final = 512  # tokens of a row where nobody says, or as many as the model takes
ROWS: Final = 1000  # training rows where nobody says: what is kept of them grows with their number
CLOSE: Final = 64
# What a divided model goes without (`sharded.WITHOUT`), by our own settings.
WITHOUT: Final = {"prefix_cache": False, "chunked_loss": False, "warm_head": False, "fused": "float32"}
LABELS: Final = ("0", "1")  # of a classifier where nobody names any


def plan(
    model: str | Path | PreTrainedModel,
    strategy: str | Strategy | Sequence[str] | None = None,
    *,
    task: str | Task | None = None,
    labels: Any = None,
    quantization: str | None = None,
    load: Mapping[str, Any] | None = None,
    length: int | None = None,
    batch: int | None = None,
    rows: int | None = None,
    args: Mapping[str, Any] | None = None,
    device: str | None = None,
    memory: str | float | None = None,
    processes: int = 1,
    sharding: str | None = None,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> Plan:
    """What a run would take: memory of every kind, file sizes, what fits; nothing is trained, no weights are read.

    Args:
        model: an id, a folder (its config.json is enough), or a live model, which is not touched.
        strategy: a name, several, or a strategy object; None for every strategy in `STRATEGIES`.
        task, labels, quantization, load, options: as for `adapt`; labels may be their number.
        length: tokens of a row; None for `max_length`, else 512 or as many as the model takes.
        batch: rows of a training batch; None for `args`' own.
        rows: training rows, as far as what is kept of them counts; None for 1000.
        args: training settings by transformers' names: batch sizes, optim, activation_checkpointing, bf16 ...
        device: a card ("rtx 4090"), "cuda" or "cpu"; None for the one here.
        memory: of it ("24GB"), where no card is named or it is known better.
        processes: that share the work, each on such a device; all sizes are those of one process.
        sharding: their engine: "ddp" (the model whole in each), "zero" (its optimizer divided, by DeepSpeed), "fsdp"
            (all of it divided), None for the first and the last, a line each.
        say: takes a line of progress a strategy, where there are several.

    Returns:
        The plan: one line a strategy and engine; a strategy that the model refuses stands there with its reason.

    Raises:
        RequestError: unknown names (the known ones are listed), a length over the model's positions, no config, an
            engine for one process.
    """
    from adapters import blueprint

    crew = Crew(processes, chosen(processes, sharding))
    where = found_device(device, memory)
    names = _named(strategy)
    settings = dict(args or {})
    if batch is not None:
        settings["per_device_train_batch_size"] = batch
    notes: list[str] = []
    labels, note = _labels(model, task, labels, options)
    notes += [note] if note else []
    lines: list[Line] = []
    drawn: blueprint.Blueprint | None = None
    size = 0
    for name in names:
        known = _own(name, options, alone=len(names) == 1)
        picked, goal, packed = requested(model, name, task, labels, quantization, known)
        if drawn is None:
            drawn = blueprint.drawn(model, goal, dict(load or {}))
            size = _length(drawn, length)
            notes += [drawn.note] if drawn.note else []
        if say is not None and len(names) > 1:
            say(f"counting {name} ({len(lines) + 1} of {len(names)})")
        lines += _lines(name, picked, packed, drawn, size, rows or ROWS, settings, where, crew, notes)
    assert drawn is not None
    if length is None and size:
        notes.append(f"rows of {size} tokens; length says otherwise")
    notes += _remarks(lines, rows)
    if loadoptions.spread(load or {}):
        notes.append("load.device_map: all weights are counted as if they lay on one device")
    return Plan(drawn.name, drawn.task.name, size, where.name, where.bytes, tuple(lines), tuple(notes), processes)


def _named(asked: Any) -> list[Any]:
    """The strategies that a caller asks for: one, several, or every one."""
    if asked is None:
        return list(every())
    return list(asked) if isinstance(asked, Sequence) and not isinstance(asked, str) else [asked]


def every() -> list[str]:
    """Every strategy that needs no option to be named."""
    return [name for name in STRATEGIES if name != "peft"]


def _own(name: Any, options: Mapping[str, Any], *, alone: bool) -> dict[str, Any]:
    """Options of one strategy among several: those that it takes; of one alone all, so that wrong ones are said."""
    if alone or not isinstance(name, str):
        return dict(options)
    from adapters.adapt import row_of

    others = set().union(*(row_of(other).names() for other in every()))
    return {key: value for key, value in options.items() if key in row_of(name).names() or key not in others}


def _labels(model: Any, task: Any, labels: Any, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The label names; where nobody says, two for a backbone that brings no head of its own."""
    from adapters.adapt import task_class
    from adapters.backbones import live_model
    from adapters.options import field_names

    if isinstance(labels, int) and not isinstance(labels, bool):
        return [str(number) for number in range(labels)], ""
    if labels is not None or not isinstance(task, str | None) or live_model(model) or "labels" in options:
        return labels, ""
    if "labels" not in field_names(task_class(task or "text-classification")):
        return None, ""
    if options.get("problem") == "regression":
        return None, ""
    return list(LABELS), f"{len(LABELS)} labels are taken for granted; labels says otherwise"


def _length(drawn: Blueprint, length: int | None) -> int:
    """Tokens of a row, held to the model's positions; 0 for pictures.

    Raises:
        RequestError: more than the model has positions for.
    """
    from adapters.anatomy import counted_from

    if drawn.model.main_input_name == "pixel_values":
        return 0
    positions = getattr(drawn.model.config.get_text_config(), "max_position_embeddings", None)
    most = positions if isinstance(positions, int) and positions > 0 else None
    offset = counted_from(drawn.model)
    if most is not None and offset is not None:
        most -= offset + 1
    asked = length if length is not None else getattr(drawn.task, "max_length", None)
    if asked is None:
        return min(LENGTH, most or LENGTH)
    if not isinstance(asked, int) or isinstance(asked, bool) or asked < 1:
        raise RequestError(message("a wrong value", where="length", expected="a number of tokens", found=repr(asked)))
    if most is not None and asked > most:
        where = f"length on {type(drawn.model).__name__}"
        raise RequestError(
            message("more tokens than the model has positions", where=where, expected=f"at most {most}", found=asked)
        )
    return asked


def _lines(
    name: Any,
    strategy: Strategy,
    packed: str | None,
    drawn: Blueprint,
    length: int,
    rows: int,
    settings: Mapping[str, Any],
    where: Device,
    crew: Crew,
    notes: list[str],
) -> list[Line]:
    """The lines of one strategy, one an engine; what is to be said of it goes to the notes."""
    from adapters import experts, reading, trial
    from adapters.quantize import Storage

    shown = name if isinstance(name, str) else strategy.name
    storage = Storage(packed)
    with quiet():
        try:
            found = trial.tried(drawn.model, strategy, drawn.head, drawn.unread, reading.of(drawn.task), storage)
        except AdaptersError as fault:
            return [Line(shown, refused=str(fault))]
        frozen = experts.left_out(found.ghost, found.names)
        notes += [frozen] if frozen and frozen not in notes else []
        return _counted(shown, found, storage, drawn, length, rows, settings, where, crew)


def _counted(
    shown: str,
    found: Trial,
    storage: Any,
    drawn: Blueprint,
    length: int,
    rows: int,
    settings: Mapping[str, Any],
    where: Device,
    crew: Crew,
) -> list[Line]:
    from adapters.activations import Batch, Conditions, Imitation
    from adapters.anatomy import count

    adapted = imagined(found, storage, drawn)
    args, own, autocast = arguments_of(adapted, settings)
    target = max(1, length)

    def of(number: int) -> Batch:
        return Batch(number, max(1, length), target)

    file = file_bytes(adapted)
    lines = []
    for engine in crew.engines or ("",):
        how = Conditions(args, own | (WITHOUT if engine == FSDP else {}), where, autocast)
        with Imitation(drawn, found, storage, how) as run:
            features, cache = before(run, adapted, drawn, of, -(-rows // crew.processes))
            whole = Line(
                shown,
                trained=adapted.trained_count,
                total=count(found.ghost.parameters()),
                features=0 if engine == FSDP or _cold(own, args) else features,
                loading=max(run.weights, sum(p.numel() * p.element_size() for p in drawn.model.parameters())),
                cache=cache,
                file=file,
                checkpoint=file + run.optimizer + run.gradients,
                batch=args.per_device_train_batch_size,
                evaluated=args.per_device_eval_batch_size,
            )
            share = crew.share(engine, run, args, settings, autocast is not None)
            lines.append(_shared(whole, _Counts(run, of), share, where))
    return lines


def _cold(own: Mapping[str, Any], args: Any) -> bool:
    """Whether a new head is stepped from where it is drawn, as the recipe says."""
    return own.get("warm_head") is False and args.max_steps > 0


@final
@dataclass(frozen=True)
class Crew:
    """The processes of a run, and the engines that are looked at; none of these for one process."""

    processes: int
    engines: tuple[str, ...]

    def share(self, engine: str, run: Imitation, args: Any, settings: Mapping[str, Any], mixed: bool) -> Share:
        """What one process holds and sends."""
        if not engine:
            return alone(run.weights)
        if engine != FSDP:
            return (replicated if engine == DDP else stepping)(run.weights, run.gradients, self.processes)
        said = (fsdp(settings) if settings.get("fsdp") else None) or {}
        kept = said.get("reshard_after_forward") is False
        parts = units(run.model, run.trained, self.processes, mixed=mixed, reshard=not kept)
        passes = 2 if args.activation_checkpointing else 1  # backward gathers anew what is computed anew
        return divided(run.weights, parts, self.processes, args.gradient_accumulation_steps, passes)


@final
class _Counts:
    """The passes of one process, each counted once."""

    def __init__(self, run: Imitation, of: Callable[[int], Batch]) -> None:
        self.run = run
        self.phases = functools.cache(lambda rows, released: run.phases(of(rows), released))
        self.evaluation = functools.cache(lambda rows: run.evaluation(of(rows)))


def _shared(whole: Line, counts: _Counts, share: Share, where: Device) -> Line:
    """The line of one process among those that share the work."""
    run, part = counts.run, share.divided
    optimizer, copies = round(share.optimizer * run.optimizer), round(part * run.copies)
    gradients = round(part * run.gradients)
    rest = share.weights + copies + optimizer + run.cast

    def step(rows: int) -> int:
        found = counts.phases(rows, share.engine == FSDP)
        passes, update = found.passes - run.resting, found.update - run.resting
        if share.engine == FSDP:
            learnt = [(name, size - run.resting) for name, size in found.learnt]
            forward = found.forward - run.resting
            return rest + max(forward + share.read, share.backward(learnt), round(part * update))
        return rest + share.buffers + max(passes, update)

    def evaluation(rows: int) -> int:
        resting: int = counts.evaluation(rows) - run.resting
        return resting + rest + share.read + (share.buffers if share.engine == DDP else 0)

    now, evaluated = step(whole.batch), evaluation(whole.evaluated)
    features = whole.features and whole.features - run.resting + rest + share.read
    largest = largest_evaluated = None
    fits: bool | None = None
    if where.room is not None:
        room = int(where.room / (1 + MARGIN))
        nothing = rest + (share.read if share.engine == FSDP else gradients + share.buffers)
        largest = most(step, room, {0: nothing, whole.batch: now})
        largest_evaluated = whole.evaluated
        if evaluated > room:
            largest_evaluated = most(evaluation, room, {0: rest + share.read, whole.evaluated: evaluated})
        fits = max(now, evaluated, features) <= room
    return dataclasses.replace(
        whole,
        weights=share.weights,
        gradients=gradients,
        optimizer=optimizer,
        copies=copies,
        activations=max(0, now - share.weights - copies - optimizer - gradients - share.buffers),
        step=now,
        evaluation=evaluated,
        features=features,
        largest=largest,
        largest_evaluated=largest_evaluated,
        fits=fits,
        engine=share.engine,
        buffers=share.buffers,
        wire=share.wire,
    )


def before(run: Imitation, adapted: Adapted, drawn: Blueprint, of: Any, rows: int) -> tuple[int, int]:
    """What passing all rows once takes before the first step, and what is kept of a frozen prefix, in bytes."""
    from adapters.options import field_names
    from adapters.prefix import ROWS as most_rows
    from adapters.prefix import TOKENS

    solved = "layer" in field_names(type(drawn.task)) and bool(drawn.new)
    if run.cut is None and not solved:
        return 0, 0
    one = of(1)
    passed = min(rows, most_rows, max(1, TOKENS // one.length))
    return run.forward(of(passed)), rows * run.state_bytes(one) if run.cut is not None else 0


def imagined(found: Trial, storage: Any, drawn: Blueprint) -> Adapted:
    """The record that `adapt` would give, around the copy without memory."""
    from adapters.adapt import live_names
    from adapters.anatomy import never_saved
    from adapters.contracts import Adapted, Record
    from adapters.fingerprint import Fingerprint

    names = (live_names(found.ghost, found.names | drawn.head)) - never_saved(found.ghost)
    record = Record(unread=drawn.unread, new=tuple(sorted(drawn.new)))
    nobody = Fingerprint({}, "")
    return Adapted(
        found.ghost, found.strategy, drawn.task, None, storage, tuple(sorted(names)), drawn.head, nobody, {}, record
    )


def arguments_of(adapted: Adapted, given: Mapping[str, Any]) -> tuple[TrainingArguments, dict[str, Any], Any]:
    """The training arguments that a run would have, our own settings, and the dtype of mixed precision.

    What only a GPU has is taken out first: transformers refuses it on a machine without one.
    """
    import torch

    from adapters import arguments

    plain = {name: value for name, value in given.items() if name not in ("bf16", "fp16", "tf32", *MANY)}
    optim = str(getattr(plain.get("optim"), "value", plain.get("optim", "")))
    if optim.startswith("paged_"):
        plain["optim"] = optim.removeprefix("paged_")
        plain["optim"] = {"adamw_32bit": "adamw_torch"}.get(plain["optim"], plain["optim"])
    args, own = arguments.settings(adapted, {"output_dir": "unused", **plain}, evaluated=True, own_metrics=False)
    autocast = torch.bfloat16 if given.get("bf16") else torch.float16 if given.get("fp16") else None
    if given.get("bf16") is False and own.get("fused", True):
        own["fused"] = "float32"
    return args, own, autocast


MANY: Final = ("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "ddp_backend")  # settings of many processes


def file_bytes(adapted: Adapted) -> int:
    """The size of the adapter file, header included."""
    from adapters import shards
    from adapters.manifest import FORMAT

    entries = {}
    for key, tensor, _ in sorted(adapted.places()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries[key] = (dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size())
    header = shards.header_bytes(entries, {"format": "pt", "holdfast": str(FORMAT)})
    return len(header) + sum(size for _, _, size in entries.values())


def most(count: Callable[[int], int], room: int, known: Mapping[int, int]) -> int:
    """About the most rows whose count stays within the room; 0 for none, `MOST` where even so many do.

    Memory grows evenly with the rows, piece by piece, so a line through two counts tells where to look. The answer has
    been counted; a number above it by more than a row in `CLOSE` has been too, or the line rules it out.

    Args:
        count: bytes of so many rows; room: that there are; known: what has been counted; 0 rows may be among it.
    """
    found = dict(known)
    low, high = 0, MOST + 1  # fits, does not
    while True:
        low = max((rows for rows, size in found.items() if size <= room), default=-1)
        high = min((rows for rows, size in found.items() if size > room), default=MOST + 1)
        if low < 0 or high - low <= 1 + low // CLOSE:
            return max(0, min(low, MOST))
        near, far = sorted(found, key=lambda rows: (abs(found[rows] - room), rows))[:2]
        slope = (found[far] - found[near]) / (far - near)
        # A line that does not rise says nothing: then between the two that are known.
        guess = near + int((room - found[near]) // slope) if slope >= 1 else (low + high) // 2
        if guess == low > 0 and low != min(known):
            return low
        guess = min(max(guess, low + 1), high - 1)
        found[guess] = count(guess)


def _remarks(lines: Sequence[Line], rows: int | None) -> Iterator[str]:
    if any(line.cache for line in lines) and rows is None:
        yield f"what is kept of the frozen prefix is that of {ROWS} rows; rows says otherwise"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What the library says of a real run is no news of a plan."""
    logger = logging.getLogger("adapters")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
