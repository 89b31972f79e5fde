"""A plan as data, and as lines for people: what each strategy takes, which of them fit, the largest batch that does."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final, final

MARGIN: Final = 0.1  # by which a real peak may lie above a planned one (docs/planning.md), left free where it must fit
MOST: Final = 1024  # rows of a batch that is looked for


@final
@dataclass(frozen=True)
class Line:
    """What one strategy would take. All sizes in bytes; 0 throughout where it is refused.

    Attributes:
        strategy: its name, as it was asked for.
        refused: why this model cannot have it; empty where it can.
        trained: parameters that train; total: of the model, with the adapters.
        weights: the model as it is kept, adapters and 4-bit scales included.
        gradients: one of each trained tensor.
        optimizer: its state.
        copies: of the trained tensors, kept beside them: as they were at the start, and the best so far.
        activations: what a training step holds beside all that, at its peak.
        step: the peak of a training step; evaluation: of evaluating a batch; features: of passing the rows once before
            the first step (a frozen prefix, or the features that a new head is solved on); 0 where none is passed.
        loading: main memory while the backbone is opened: in full precision, before it is packed.
        cache: on disk (or in memory, with prefix_cache_gb=0): the kept prefix of all rows.
        file: the adapter file, to the byte; checkpoint: about, of each checkpoint on disk.
        batch: rows of a training batch; evaluated: rows of an evaluation batch.
        largest: the most rows of a training batch that fit the device; 0 for none, None where no memory was named.
        largest_evaluated: the rows of an evaluation batch as it was planned, or the most that fit.
        fits: whether the run fits as it is planned; None where no memory was named.
        engine: "ddp" or "fsdp" where several processes share the work, sizes being those of one of them; else "".
        buffers: of `step`, what the engine takes: to gather weights, to sum gradients up.
        wire: bytes that a process sends in an optimizer step.
    """

    strategy: str
    refused: str = ""
    trained: int = 0
    total: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    copies: int = 0
    activations: int = 0
    step: int = 0
    evaluation: int = 0
    features: int = 0
    loading: int = 0
    cache: int = 0
    file: int = 0
    checkpoint: int = 0
    batch: int = 0
    evaluated: int = 0
    largest: int | None = None
    largest_evaluated: int | None = None
    fits: bool | None = None
    engine: str = ""
    buffers: int = 0
    wire: int = 0

    @property
    def name(self) -> str:
        """The strategy, and the engine where there are several processes."""
        return f"{self.strategy}/{self.engine}" if self.engine else self.strategy

    @property
    def peak(self) -> int:
        """The most bytes of tensors at once in the whole run."""
        return max(self.step, self.evaluation, self.features)


@final
@dataclass(frozen=True)
class Plan:
    """What the strategies would take on one model, task, length, batch and device.

    Attributes:
        model, task: as they were asked for.
        length: tokens of a row; 0 for pictures.
        device: its name; memory: its bytes, None where nobody said.
        lines: one a strategy.
        notes: what was taken for granted.
        processes: that share the work, each on a device of its own.
    """

    model: str
    task: str
    length: int
    device: str
    memory: int | None
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()
    processes: int = 1

    @property
    def fitting(self) -> tuple[Line, ...]:
        """The strategies that fit: what sends least over the wire first, of equals the smallest peak."""
        return tuple(sorted((line for line in self.lines if line.fits), key=lambda line: (line.wire, line.peak)))

    @property
    def cheapest(self) -> Line | None:
        """The first of those that fit: of one process the one that takes the least memory; None where none fits."""
        return next(iter(self.fitting), None)

    def to_json(self) -> dict[str, Any]:
        """As plain data, sizes in bytes."""
        lines = [{**dataclasses.asdict(line), "peak": line.peak} for line in self.lines]
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "lines"},
            "notes": list(self.notes),
            "lines": lines,
            "fitting": [line.name for line in self.fitting],
            "cheapest": self.cheapest.name if self.cheapest else None,
            "margin": MARGIN,
        }

    def __str__(self) -> str:
        return "\n".join(self.said())

    def said(self) -> list[str]:
        """The plan in plain lines: a table, then the verdict."""
        several = ("buffers", "sent a step") if self.processes > 1 else ()
        sizes = ("weights", "grads", "optim", "activ.", *several, "peak", "file")
        head = ("strategy", "trained", *sizes, "largest batch", "fits")
        rows = [head, *(_cells(line, bool(several)) for line in self.lines)]
        short = [row for row in rows if len(row) > 2]
        widths = [max(len(row[column]) for row in short) for column in range(len(head))]
        told = []
        for row in rows:
            if len(row) == 2:
                told.append(f"{row[0]:<{widths[0]}}  {row[1]}")
            else:
                cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
                told.append("  ".join(cells).rstrip())
        return [self.title(), "", *told, "", *self.verdict()]

    def title(self) -> str:
        """What the plan is of."""
        batch = next((line.batch for line in self.lines if not line.refused), 0)
        size = f"{self.length} tokens a row, " if self.length else ""
        where = f"{self.device}" + (f" ({gigabytes(self.memory)})" if self.memory is not None else "")
        where += f", {self.processes} processes, each" if self.processes > 1 else ""
        return f"{self.model}, {self.task}: {size}{batch} rows a batch, on {where}"

    def verdict(self) -> list[str]:
        """What fits, what is cheapest, and what was taken for granted."""
        told = []
        if self.memory is not None:
            fitting = ", ".join(line.name for line in self.fitting) or "nothing"
            told.append(f"fits      {fitting}  (peak and {MARGIN:.0%} on top)")
            if self.cheapest is not None:
                sent = f", {gigabytes(self.cheapest.wire)} sent a step" if self.processes > 1 else ""
                told.append(f"cheapest  {self.cheapest.name}: {gigabytes(self.cheapest.peak)} at its peak{sent}")
            for line in self.lines:
                if line.fits is False and line.largest and line.largest_evaluated:
                    smaller = {
                        "per_device_train_batch_size": min(line.largest, line.batch),
                        "per_device_eval_batch_size": min(line.largest_evaluated, line.evaluated),
                    }
                    how = ", ".join(f"{name}={rows}" for name, rows in smaller.items())
                    told.append(f"smaller   {line.name} fits with {how}")
        loading = max((line.loading for line in self.lines if line.loading > line.weights), default=0)
        if loading:
            told.append(f"loading   {gigabytes(loading)} of main memory while a backbone is opened that is then packed")
        return told + [f"note      {note}" for note in self.notes]


def _cells(line: Line, several: bool) -> tuple[str, ...]:
    if line.refused:
        return line.strategy, f"- {line.refused}"
    largest = "" if line.largest is None else str(line.largest) if line.largest < MOST else f"{MOST}+"
    fits = "" if line.fits is None else "yes" if line.fits else "no"
    engine = (line.buffers, line.wire) if several else ()
    sizes = (line.weights, line.gradients, line.optimizer, line.activations, *engine, line.peak, line.file)
    return (line.name, f"{line.trained:,}", *map(gigabytes, sizes), largest, fits)


def gigabytes(size: int) -> str:
    """Bytes for people: 10^9 a GB."""
    for unit, width in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= width:
            return f"{size / width:.{1 if size < 100 * width else 0}f} {unit}"
    return f"{size} B"
