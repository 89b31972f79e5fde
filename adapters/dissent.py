"""On which rows two adapters answer differently."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from adapters.errors import RequestError, message
from adapters.formats import arrange
from adapters.predict import predict
from adapters.storage import load

FIRST = 5  # rows that are kept with both answers


@final
@dataclass(frozen=True)
class Apart:
    """A row that is answered differently.

    Attributes:
        row: its number, from 0.
        input: the task's first column.
        a, b: both answers, without their scores.
    """

    row: int
    input: str
    a: Any
    b: Any


@final
@dataclass(frozen=True)
class Agreement:
    """The answers of two adapters to the same rows.

    Attributes:
        rows: how many.
        differ: of these, how many are answered differently; scores do not count.
        first: the first few of them.
    """

    rows: int
    differ: int
    first: tuple[Apart, ...]

    @property
    def share(self) -> float:
        """Rows that are answered alike, as a share of all."""
        return 1 - self.differ / self.rows if self.rows else 1.0

    def to_json(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "agreement": self.share}

    def lines(self) -> list[str]:
        """For people."""
        found = [f"answers   agree on {self.rows - self.differ} of {self.rows} rows ({100 * self.share:.3g} %)"]
        found += [f"  row {one.row}: A {one.a!r}, B {one.b!r}  {_cut(one.input)}" for one in self.first]
        if self.differ > len(self.first):
            found.append(f"  ... and {self.differ - len(self.first)} more")
        return found


def compared(
    a: Path,
    b: Path,
    rows: Any,
    columns: Mapping[str, str],
    base: str | Path | None,
    say: Callable[[str], None],
) -> Agreement:
    """Both adapters answer the same rows, one after the other, so that one backbone is in memory at a time.

    Args:
        a, b: adapter folders.
        rows: of one part, as `data.one` gives them.
        columns: task column -> column of the data.
        base: the backbone, where it is not the one that they name.
        say: takes what is to be said.

    Raises:
        RequestError: adapters of different tasks.
        DataError: rows that the task does not take.
    """
    answers, inputs, tasks = [], list[Any](), list[str]()
    for folder in (a, b):
        adapted = load(folder, None if base is None else str(base))
        tasks.append(adapted.task.name)
        if tasks[0] != tasks[-1]:
            raise RequestError(
                message(
                    "the answers of different tasks cannot be compared",
                    where="rows",
                    expected=tasks[0],
                    found=tasks[-1],
                    remedy="Leave the rows out.",
                )
            )
        arranged, remark = arrange(rows, columns, adapted.task.columns)
        if remark and not inputs:
            say(remark)
        first = next(name for name in adapted.task.columns if name in arranged.column_names)
        inputs = inputs or [_shown(value) for value in arranged[first]]
        answers.append([bare(answer) for answer in predict(adapted, arranged)])
        del adapted
    apart = [row for row, pair in enumerate(zip(*answers, strict=True)) if pair[0] != pair[1]]
    found = tuple(Apart(row, inputs[row], answers[0][row], answers[1][row]) for row in apart[:FIRST])
    return Agreement(len(inputs), len(apart), found)


def bare(answer: Any) -> Any:
    """An answer without its scores: of labels in order the best, of one label its name, a bare number to 3 decimals."""
    if isinstance(answer, Mapping):
        if set(answer) == {"score"}:
            return round(float(answer["score"]), 3)
        kept = {name: bare(value) for name, value in answer.items() if name not in ("score", "scores")}
        return next(iter(kept.values())) if len(kept) == 1 else kept
    if isinstance(answer, list) and answer and all(isinstance(one, Mapping) for one in answer):
        if all(set(one) == {"label", "score"} for one in answer):
            return bare(answer[0])
        return [bare(one) for one in answer]
    return answer


def _shown(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = " ".join(map(str, value))
    return str(value)


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."
