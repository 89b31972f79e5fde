"""A run over a stream: the stream opened for it, followed from epoch to epoch, and gone on with from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast, final

from transformers import TrainerCallback

from adapters import formats, heads, inflow, streaming
from adapters.contracts import Adapted, Draw
from adapters.errors import DataError, RequestError, message
from adapters.lanes import BUFFER, Flow
from adapters.options import field_names

if TYPE_CHECKING:
    from datasets import Dataset


def opened(
    adapted: Adapted, rows: Any, columns: Mapping[str, str] | None, draw: Draw, own: Mapping[str, Any], steps: int
) -> Flow:
    """A stream of raw rows, which the task prepares on the way, or of model inputs.

    Args:
        adapted: what is to be trained.
        rows: the stream, opened or not.
        columns: task column -> column of the stream; where nothing is said, as it says itself.
        draw: whose seed and epoch the order follows.
        own: settings beside transformers'; "shuffle_buffer" counts: raw rows that a reader mixes, None for the usual
            number, or for none where the rows are model inputs.
        steps: that the run takes; 0 or less where nobody has said.

    Raises:
        RequestError: no number of steps, what all rows are needed for, or a stream that was divided.
        DataError: no rows, or rows that the task cannot take.
    """
    source, task = inflow.opened(rows), cast("Any", adapted.task)
    weights = task.class_weights if "class_weights" in field_names(type(task)) else None
    faults = inflow.unheard(steps, weights, own.get("warm_head"))
    if faults:
        raise RequestError(*faults.values())
    columns = columns or source.columns
    first = source.first(1)
    prepared = bool(first) and adapted.model.main_input_name in first[0][1] and "labels" in first[0][1]

    def prepare(rows: list[Mapping[str, Any]]) -> tuple[Iterable[Mapping[str, Any]], list[str]]:
        arranged, _ = formats.arrange(streaming.block(rows, source.features), columns, task.columns)
        made: tuple[Dataset, list[str]] = task.prepare(arranged, adapted.processor, adapted.model, labelled=True)
        return made

    buffer = own.get("shuffle_buffer")
    if buffer is None:
        buffer = 0 if prepared else BUFFER
    flow = Flow(source, None if prepared else prepare, draw, int(buffer))
    if heads.is_new(adapted):
        flow.remarks.append("the rows are a stream, of which no head is solved: it starts as it is drawn")
    return flow


def begun(rows: Any, epoch: int) -> tuple[int, int] | None:
    """Where transformers is to begin with training rows: with a stream, which goes on by itself, at no batch."""
    return (epoch, 0) if isinstance(rows, Flow) else None


def position(rows: Any) -> dict[str, Any] | None:
    """Where the epoch of training rows is, if they are a stream; see `Flow.position`."""
    return rows.position() if isinstance(rows, Flow) else None


def resumed(rows: Any, progress: Mapping[str, Any]) -> tuple[int, int]:
    """The epoch and its batches that a checkpoint has come to; a stream goes on from there.

    Args:
        rows: to train on.
        progress: of the checkpoint.
    """
    epoch, batches = progress["position"]
    if isinstance(rows, Flow) and not rows.resume(progress["lanes"]):
        return epoch + 1, 0
    return epoch, batches


@final
class Onward(TrainerCallback):
    """Moves a stream from epoch to epoch, and counts the part of an epoch that its steps were.

    Args:
        flow: the stream; its epoch is that of its draw.
        batches: of the epoch at hand, up to now.
        say: takes what is to be said, once each.
    """

    def __init__(self, flow: Flow, batches: Callable[[], int], say: Callable[[str], None]) -> None:
        self._flow, self._batches, self._say = flow, batches, say
        self._stepped = self._went_on = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What there is to say of the first block."""
        for remark in self._flow.remarks:
            self._say(remark)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin anew, unless the epoch goes on from a checkpoint."""
        self._stepped, self._went_on = False, self._flow.resumed
        if not self._flow.resumed:
            self._flow.begin()
        self._flow.resumed = False
        self._flow.deal(args.dataloader_num_workers)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """There is a step in this epoch."""
        self._stepped = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """transformers counts from where a process began to read."""
        steps = state.max_steps * args.gradient_accumulation_steps
        state.epoch = self._flow.draw.epoch + self._batches() / max(1, steps)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An epoch of which nothing was left goes by as any other; one without rows is an error."""
        if not self._stepped:
            if not self._went_on:
                raise DataError(message("the stream gave no rows", where=f"epoch {self._flow.draw.epoch}"))
            control.should_training_stop = False  # transformers ends the run where it finds no row
        self._flow.ended = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What there is to say of all rows that were read."""
        for remark in self._flow.said():
            self._say(remark)
