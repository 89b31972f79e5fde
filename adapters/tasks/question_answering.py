"""Extractive question answering: the piece of a context that answers a question, or none."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from adapters import metrics, spans
from adapters.data import need_column, texts_in
from adapters.errors import DataError, RequestError, message
from adapters.options import check_types
from adapters.tokens import length_faults

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.contracts import Draw

    Array = np.ndarray[Any, Any]

START, END, PADDING = 1, 2, -100  # bits of a token's label; a token that is none
NOWHERE = -100  # the place of an answer that no window holds whole: nothing is learnt from it
SENTENCE = re.compile(r".+?[.!?](?=\s|$)", re.DOTALL)


@final
@dataclass(frozen=True)
class QuestionAnswering:
    """Questions and contexts to the piece of the context that answers.

    Attributes:
        max_length: tokens of a window, question included; None for as many as tokenizer and model take.
        stride: tokens that neighbouring windows of a long context share; None for a third of the window.
        max_answer_length: tokens of an answer at most.
        no_answer: whether "no answer" may be said; None reads it off the training rows (False without such rows).
        threshold: how much likelier than the best answer "no answer" must be to be said, in log-probabilities.
    """

    name: ClassVar[str] = "question-answering"
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    pipeline: ClassVar[str] = "question-answering"
    processor: ClassVar[str] = "AutoTokenizer"
    columns: ClassVar[Mapping[str, str]] = {
        "question": "the question",
        "context": "the text that holds the answer",
        "answers": '{"text": [...], "answer_start": [...]}, empty lists for no answer',
        "answer": "the answer, empty for none (instead of answers)",
        "answer_start": "the character at which it begins",
        "id": "the question's own name (optional)",
    }
    apart: ClassVar[tuple[str, ...]] = ("context",)

    max_length: int | None = None
    stride: int | None = None
    max_answer_length: int = 30
    no_answer: bool | None = None
    threshold: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        faults = length_faults(self.max_length)
        for option, fine, expected in (
            ("stride", self.stride is None or self.stride >= 0, "a number of tokens >= 0"),
            ("max_answer_length", self.max_answer_length > 0, "a number of tokens > 0"),
            ("threshold", math.isfinite(self.threshold), "a finite number"),
        ):
            if not fine:
                faults.append(message("a wrong value", where=option, expected=expected, found=getattr(self, option)))
        if faults:
            raise RequestError(*faults)

    # ------------------------------------------------------------------ the model

    @property
    def best_metric(self) -> tuple[str, bool]:
        """F1 over the words of the answers."""
        return "f1", True

    @property
    def stratum(self) -> str | None:
        """None: answers are no classes."""
        return None

    def complete(self, model: PreTrainedModel) -> Self:
        """Whether "no answer" may be said, where it was left open: not unless the training rows said so.

        Raises:
            RequestError: a head that does not give a start and an end.
        """
        if model.config.num_labels != 2:
            raise RequestError(
                message(
                    "the model's head does not give a start and an end",
                    where=type(model).__name__,
                    expected="2 outputs",
                    found=model.config.num_labels,
                    remedy="Load the model with num_labels=2, or adapt it by its id or folder.",
                )
            )
        return self if self.no_answer is not None else replace(self, no_answer=False)

    def config(self) -> dict[str, Any]:
        """The head's size: a start and an end."""
        return {"num_labels": 2}

    def head(self, model: PreTrainedModel) -> set[str]:
        """What lies outside the base model."""
        from adapters.anatomy import outside_backbone

        return outside_backbone(model)

    def describe(self) -> str:
        """How long an answer may be, and whether there may be none."""
        return f"{self.name}, at most {self.max_answer_length} tokens{', or no answer' if self.no_answer else ''}"

    # ------------------------------------------------------------------ the rows

    def with_rows(self, rows: Dataset) -> Self:
        """Whether training rows without an answer ask for "no answer", where it was left open."""
        if self.no_answer is not None:
            return self
        return replace(self, no_answer=any(not right for right in spans.right_answers(rows)))

    def with_data(self, rows: Dataset) -> Self:
        """Nothing else depends on the training rows."""
        return self

    def check(self, rows: Dataset, *, labelled: bool) -> None:
        """Look at every raw row before anything is loaded.

        Raises:
            DataError: a missing column, a row that is not text, an answer that does not stand where it should, no
                answer where the task is not to say so.
        """
        for column in ("question", "context"):
            need_column(rows, column)
            texts_in(rows[column], column)
        for number, right in enumerate(spans.right_answers(rows) if labelled else ()):
            if not right and self.no_answer is False:
                raise DataError(
                    message(
                        "a question without an answer",
                        where=f"row {number}",
                        remedy="Say no_answer=True where the task is to say so, or remove the row.",
                    )
                )

    def prepare(
        self, rows: Dataset, processor: Any, model: PreTrainedModel, *, labelled: bool
    ) -> tuple[Dataset, list[str]]:
        """Windows of the contexts, and where the answer stands in each.

        Returns:
            A data set with a row a window: input_ids, attention_mask, length, row; begins and ends (a token's
            characters in the context), null, example (the raw row), context; and if labelled start and end (tokens)
            and right (the right answers). And remarks to be said once.

        Raises:
            DataError: what `check` raises.
        """
        from adapters import tokens, windows

        if "input_ids" in rows.column_names:
            raise DataError(
                message(
                    "token ids instead of questions",
                    where="column 'input_ids'",
                    expected="raw rows: what is measured are answers, which stand in the contexts",
                )
            )
        tokens.need_fast(processor)
        self.check(rows, labelled=labelled)
        columns, remarks = windows.encode(
            list(rows["question"]),
            list(rows["context"]),
            processor,
            model,
            max_length=self.max_length,
            stride=self.stride,
        )
        if labelled:
            remarks += self._place(columns, list(spans.right_answers(rows)))
        return tokens.numbered(columns), remarks

    def _place(self, columns: dict[str, list[Any]], answers: Sequence[Sequence[tuple[str, int]]]) -> list[str]:
        """Add start, end and right to the windows; what was lost, to be said."""
        from adapters import windows

        places: list[tuple[int, int] | None] = []
        held, long = set(), set()
        for window, example in enumerate(columns["example"]):
            found = None
            if answers[example]:
                text, start = answers[example][0]  # of several right answers the first is learnt, all are measured
                begin = start + len(text) - len(text.lstrip())
                found = windows.place(
                    columns["begins"][window], columns["ends"][window], begin, begin + len(text.strip())
                )
                if found is not None:
                    held.add(example)
                if found is not None and found[1] - found[0] >= self.max_answer_length:
                    long.add(example)
            places.append(found)
        lost = {number for number, right in enumerate(answers) if right} - held
        for example, found, null in zip(columns["example"], places, columns["null"], strict=True):
            pair = (NOWHERE, NOWHERE) if example in lost else found or (null, null)
            for name, value in zip(("start", "end"), pair, strict=True):
                columns.setdefault(name, []).append(value)
        columns["right"] = [[text for text, _ in answers[example]] for example in columns["example"]]
        remarks = []
        if lost:
            remarks.append(
                f"{len(lost)} of {len(answers)} answers stand whole in no window, first in row {min(lost)}: nothing is "
                "learnt from them"
            )
        if long:
            remarks.append(
                f"{len(long)} of {len(answers)} answers are longer than {self.max_answer_length} tokens, first in row "
                f"{min(long)}: never given whole (max_answer_length)"
            )
        return remarks

    # ------------------------------------------------------------------ batches, losses, answers

    def collate(
        self, features: Sequence[Mapping[str, Any]], model: PreTrainedModel, processor: Any, draw: Draw | None = None
    ) -> dict[str, Any]:
        """Right-padded batch: input_ids, attention_mask and labels, each (rows, longest).

        A token's label is 0, with bit 1 where the answer starts and bit 2 where it ends; padding is -100.
        """
        from adapters.tokens import padded, stacked

        batch = padded(features, model)
        if "start" in features[0]:
            rows = []
            for feature in features:
                labels = [0] * len(feature["input_ids"])
                for name, bit in (("start", START), ("end", END)):
                    if feature[name] != NOWHERE:
                        labels[feature[name]] |= bit
                rows.append(labels)
            batch["labels"] = stacked(rows, PADDING)
        return batch

    def items(self, labels: Tensor) -> int:
        """Starts and ends."""
        return sum(int(_marked(labels, bit).sum()) for bit in (START, END))

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Cross-entropy of start and end over the tokens of a window, padding left out: the sum over the batch, divided
        by the starts and ends of the whole global batch.

        Args:
            outputs: with start_logits and end_logits, shape (rows, longest).
            labels: what `collate` makes, shape (rows, longest).
            num_items_in_batch: starts and ends in the global batch; None means this batch alone.
        """
        items = max(self.items(labels), 1) if num_items_in_batch is None else num_items_in_batch
        sides = ((outputs.start_logits, START), (outputs.end_logits, END))
        start, end = (
            logits.float().masked_fill(labels == PADDING, -math.inf).log_softmax(-1)[_marked(labels, bit)].sum()
            for logits, bit in sides
        )
        loss: Tensor = -(start + end) / items
        return loss

    def measured(
        self, outputs: Any, batch: Mapping[str, Any], model: PreTrainedModel, processor: Any
    ) -> tuple[Tensor, ...]:
        """Start and end logits, each of shape (rows, longest)."""
        return outputs.start_logits, outputs.end_logits

    def metrics(self, found: Sequence[Array], rows: Dataset, processor: Any) -> dict[str, float]:
        """Exact match and F1 over words, each as a share from 0 to 1, of the answers that `predict` gives."""
        given = [entry["answer"] for entry in self._spans(found, rows)]
        return metrics.answers(given, [right for _, right in _questions(rows)])

    def findings(self, found: Sequence[Array], rows: Dataset, raw: Dataset | None, processor: Any) -> dict[str, Any]:
        """Scores by length of the right answer and by kind of question, calibration, and the surest wrong answers."""
        import numpy as np

        from adapters import findings

        given, questions = self._spans(found, rows), list(_questions(rows))
        numbers = list(dict.fromkeys(rows["example"]))
        pairs = [(entry["answer"], right) for entry, (_, right) in zip(given, questions, strict=True)]
        each = [metrics.answers([answer], [right]) for answer, right in pairs]
        exact, overlap = (np.asarray([one[name] for one in each]) for name in ("exact_match", "f1"))
        sure = np.clip(np.asarray([entry["score"] for entry in given]), 0.0, 1.0)
        asked = raw["question"] if raw is not None else [""] * (max(numbers, default=0) + 1)
        groups: dict[str, list[tuple[int, str]]] = {
            "By length of the right answer": [_length_of(right) for _, right in questions],
            "By kind of question": [_kind_of(asked[number]) for number in numbers] if raw is not None else [],
        }

        def shown(row: int) -> dict[str, Any]:
            context, right = questions[row]
            begin = context.find(right[0]) if right else given[row]["start"]
            return {
                "row": int(numbers[row]),
                "question": findings.cut(asked[numbers[row]], 240),
                "text": findings.around(context, max(begin, 0), max(begin, 0) + len(right[0] if right else "")),
                "expected": " / ".join(dict.fromkeys(findings.cut(text, 120) for text in right[:3])) or "no answer",
                "said": findings.cut(given[row]["answer"], 160) or "no answer",
                "score": round(float(sure[row]), 4),
            }

        return {
            "bars": [
                {
                    "title": title,
                    "bars": [
                        {"name": name[1], "value": float(overlap[inside].mean()), "rows": int(inside.sum())}
                        for name in sorted(set(names))
                        for inside in [np.asarray([entry == name for entry in names])]
                    ],
                    "unit": "F1",
                }
                for title, names in groups.items()
                if names
            ],
            "calibration": findings.calibration(sure, exact, "answers, right where they match exactly"),
            "errors": findings.worst((1 - overlap) * (1 + sure), overlap < 1, shown),
        }

    def answered(self, model: PreTrainedModel, batch: Mapping[str, Any], processor: Any) -> tuple[Tensor, ...]:
        """Start and end logits, each of shape (rows, longest)."""
        outputs = model(**batch)
        return outputs.start_logits, outputs.end_logits

    def decode(
        self, found: Sequence[Array], rows: Dataset, processor: Any
    ) -> list[dict[str, Any] | list[dict[str, Any]]]:
        """score, start, end (characters of the context) and answer of each question; an empty one for no answer."""
        return [*self._spans(found, rows)]

    def _spans(self, found: Sequence[Array], rows: Dataset) -> list[dict[str, Any]]:
        """The best answer of each question over all of its windows."""
        import numpy as np

        from adapters.windows import best_span

        best: dict[int, tuple[float, dict[str, Any]]] = {}
        nothing: dict[int, float] = {}
        for starts, ends, row in zip(*found, rows, strict=True):
            example, tokens = row["example"], len(row["input_ids"])
            allowed = np.asarray(row["begins"]) >= 0
            score, first, last, none = best_span(
                starts[:tokens], ends[:tokens], allowed, row["null"], self.max_answer_length
            )
            nothing[example] = min(none, nothing.get(example, math.inf))
            if example not in best or score > best[example][0]:
                best[example] = score, _answer(row, first, last, score)
        answers = []
        for example, (score, answer) in best.items():
            silent = self.no_answer and nothing[example] - score > self.threshold
            said = {"score": math.exp(nothing[example]), "start": 0, "end": 0, "answer": ""} if silent else answer
            answers.append(said)
        return answers

    def baseline(self, train: Dataset, test: Dataset, processor: Any) -> dict[str, float]:
        """The metrics of the best answer that never looks at the question.

        Of three it is the one with the highest F1 over the training rows: no answer; the first sentence of the context;
        its first words, as many as the median answer has.
        """
        length = statistics.median_low([len(right[0].split()) for _, right in _questions(train) if right] or [1])
        constants = (
            lambda context: "",
            lambda context: (SENTENCE.match(context) or [context])[0],
            lambda context: " ".join(context.split()[:length]),
        )

        def measured(constant: Any, rows: Dataset) -> dict[str, float]:
            questions = list(_questions(rows))
            given = [constant(context) for context, _ in questions]
            return metrics.answers(given, [right for _, right in questions])

        return measured(max(constants, key=lambda constant: measured(constant, train)["f1"]), test)


def _length_of(right: Sequence[str]) -> tuple[int, str]:
    """The group of a right answer, with its place among the groups."""
    words = len(right[0].split()) if right else 0
    bounds = ((0, "no answer"), (1, "1 word"), (2, "2 words"), (4, "3 to 4"), (8, "5 to 8"))
    return next(((place, name) for place, (most, name) in enumerate(bounds) if words <= most), (9, "9 and more"))


def _kind_of(question: str) -> tuple[int, str]:
    """The group of a question: the word that asks."""
    words = re.findall(r"[a-z]+", question.lower())
    asking = ("what", "which", "who", "when", "where", "how", "why")
    return next(((asking.index(word), word) for word in words if word in asking), (9, "other"))


def _marked(labels: Tensor, bit: int) -> Tensor:
    return (labels >= 0) & (labels & bit).bool()


def _answer(row: Mapping[str, Any], first: int, last: int, score: float) -> dict[str, Any]:
    """The words from one token to another, without the spaces that a tokenizer counts to a word."""
    if score == -math.inf:
        return {"score": 0.0, "start": 0, "end": 0, "answer": ""}
    begin, end = row["begins"][first], row["ends"][last]
    text = row["context"][begin:end]
    begin += len(text) - len(text.lstrip())
    answer = text.strip()
    return {"score": math.exp(score), "start": begin, "end": begin + len(answer), "answer": answer}


def _questions(rows: Dataset) -> Iterator[tuple[str, list[str]]]:
    """Context and right answers of each question, from its first window."""
    last = None
    for example, context, right in zip(rows["example"], rows["context"], rows["right"], strict=True):
        if example != last:
            yield context, right
        last = example
