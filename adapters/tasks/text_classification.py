"""Text classification: one label, several labels, or a number for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from adapters import reading
from adapters.classes import Classes
from adapters.data import need_column, texts_in
from adapters.errors import RequestError, message
from adapters.labels import named
from adapters.options import check_types
from adapters.tokens import length_faults

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.contracts import Draw


@final
@dataclass(frozen=True)
class TextClassification:
    """Texts (or pairs) to labels or to a number.

    Attributes:
        labels: the label names in the order of the head's outputs; empty for regression.
        problem: "single-label", "multi-label" or "regression".
        max_length: tokens that a row is cut to; None for as many as tokenizer and model take.
        class_weights: None, "balanced" (inverse to frequency in the training rows, 1 on average), or label -> weight.
        label_smoothing: share of the target spread over all labels (Szegedy et al., 2016).
        threshold: the probability from which a label counts as given (multi-label).
        pooling: which hidden state the output layer reads: "own" (the model class's way), of the tokens that are no
            padding the "first", the "mean" or the "last"; None for "own", or what a solved probe chooses.
        layer: how many blocks run below the head, 1 to all of them; None for all, or what a solved probe chooses.
    """

    name: ClassVar[str] = "text-classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    pipeline: ClassVar[str] = "text-classification"
    processor: ClassVar[str] = "AutoTokenizer"
    columns: ClassVar[Mapping[str, str]] = {
        "text": "the text",
        "text_pair": "the second text of a pair (optional)",
        "label": "a label's name, a list of names, or a number",
    }
    apart: ClassVar[tuple[str, ...]] = ("text",)

    labels: tuple[str, ...] = ()
    problem: str = "single-label"
    max_length: int | None = None
    class_weights: Mapping[str, float] | str | None = None
    label_smoothing: float = 0.0
    threshold: float = 0.5
    pooling: str | None = None
    layer: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.labels, str):
            raise RequestError(message("one text instead of names", where="labels", found=repr(self.labels)))
        if isinstance(self.labels, list | tuple):
            object.__setattr__(self, "labels", tuple(str(label) for label in self.labels))
        check_types(self)
        faults = self._classes.faults() + length_faults(self.max_length)
        faults += reading.faults(self.pooling, self.layer)
        if faults:
            raise RequestError(*faults)

    @property
    def _classes(self) -> Classes:
        return Classes(self.labels, self.problem, self.class_weights, self.label_smoothing, self.threshold)

    # ------------------------------------------------------------------ the model

    @property
    def best_metric(self) -> tuple[str, bool]:
        """Accuracy for one label, macro F1 for several, the mean squared error for numbers."""
        return self._classes.best_metric

    @property
    def stratum(self) -> str | None:
        """The label, where a row has one."""
        return "label" if self.problem == "single-label" else None

    def complete(self, model: PreTrainedModel) -> Self:
        """Labels and problem from the model's own head where they were left open.

        Raises:
            RequestError: no labels anywhere, or a head of another size.
        """
        found = self._classes.complete(model)
        return replace(self, labels=found.labels, problem=found.problem)

    def config(self) -> dict[str, Any]:
        """The head's size and label names."""
        return self._classes.config()

    def head(self, model: PreTrainedModel) -> set[str]:
        """What lies outside the base model."""
        from adapters.anatomy import outside_backbone

        return outside_backbone(model)

    def describe(self) -> str:
        """Problem and labels, and where the head reads if not at the class's own place."""
        return f"{self.name}, {self._classes.describe()}{reading.described(self)}"

    # ------------------------------------------------------------------ the rows

    def with_rows(self, rows: Dataset) -> Self:
        """The label names that training rows hold, where none were given."""
        return self if self.labels else replace(self, labels=self._classes.labels_in(rows))

    def with_data(self, rows: Dataset) -> Self:
        """Class weights "balanced" made concrete for these training rows."""
        return replace(self, class_weights=self._classes.balanced(rows))

    def check(self, rows: Dataset, *, labelled: bool) -> None:
        """Look at every raw row before anything is loaded.

        Raises:
            DataError: a missing column, a row that is not text, a label that is missing or unknown.
        """
        need_column(rows, "text")
        for column in ("text", "text_pair"):
            if column in rows.column_names:
                texts_in(rows[column], column)
        if labelled:
            self._classes.check(rows)

    def divides(self, rows: Dataset) -> bool:
        """Each raw row is one prepared row."""
        return "input_ids" not in rows.column_names

    def prepare(
        self, rows: Dataset, processor: Any, model: PreTrainedModel, *, labelled: bool
    ) -> tuple[Dataset, list[str]]:
        """Token ids and labels, row by row.

        Returns:
            A data set with input_ids, attention_mask, labels (class number, 0/1 row, or number), length and row (its
            number), in the order of `rows`; and remarks to be said once.

        Raises:
            DataError: a missing column, a row that is not text, a label that is missing or unknown.
        """
        from adapters import tokens

        if "input_ids" in rows.column_names:
            prepared = tokens.taken(rows, model, labelled=labelled)
            if labelled:
                self._classes.check_prepared(prepared)
            return prepared, []
        tokens.need_tokenizer(processor)
        self.check(rows, labelled=labelled)
        pairs = rows["text_pair"][:] if "text_pair" in rows.column_names else None
        columns, cut = tokens.encode(rows["text"][:], pairs, processor, model, max_length=self.max_length)
        if labelled:
            classes = self._classes
            columns["labels"] = [classes.target(named(rows, cell), n) for n, cell in enumerate(rows["label"])]
        limit = tokens.limit_of(self.max_length, processor, model)
        return tokens.numbered(columns), tokens.cut_remark(cut, len(rows), limit)

    # ------------------------------------------------------------------ batches, losses, answers

    def collate(
        self, features: Sequence[Mapping[str, Any]], model: PreTrainedModel, processor: Any, draw: Draw | None = None
    ) -> dict[str, Any]:
        """Right-padded batch: input_ids, attention_mask (rows, longest), labels (rows,) or (rows, labels)."""
        from adapters.tokens import padded

        batch = padded(features, model)
        if "labels" in features[0]:
            batch["labels"] = self._classes.targets(features)
        return batch

    def items(self, labels: Tensor) -> int:
        """Every label entry."""
        return labels.numel()

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Cross-entropy, binary cross-entropy or squared error; see `Classes.loss`."""
        return self._classes.loss(outputs.logits, labels, num_items_in_batch)

    def measured(
        self, outputs: Any, batch: Mapping[str, Any], model: PreTrainedModel, processor: Any
    ) -> tuple[Tensor, ...]:
        """The logits, shape (rows, labels)."""
        return (outputs.logits,)

    def metrics(self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, processor: Any) -> dict[str, float]:
        """Accuracy and macro F1; for regression Pearson's correlation and the mean squared error."""
        import numpy as np

        return self._classes.metrics(found[0], np.asarray(rows["labels"][:]))

    def findings(
        self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, raw: Dataset | None, processor: Any
    ) -> dict[str, Any]:
        """Matrix, scores by label, calibration and the surest errors; of a regression predicted against right."""
        import numpy as np

        from adapters import findings

        def shown(row: int) -> dict[str, Any]:
            number = int(rows[row]["row"])
            if raw is None:
                return {"row": number, "text": findings.cut(processor.decode(rows[row]["input_ids"]))}
            pair = {"pair": findings.cut(raw[number]["text_pair"])} if "text_pair" in raw.column_names else {}
            return {"row": number, "text": findings.cut(raw[number]["text"]), **pair}

        return self._classes.findings(found[0], np.asarray(rows["labels"][:]), shown)

    def answered(self, model: PreTrainedModel, batch: Mapping[str, Any], processor: Any) -> tuple[Tensor, ...]:
        """The logits, shape (rows, labels)."""
        return (model(**batch).logits,)

    def decode(
        self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, processor: Any
    ) -> list[dict[str, Any] | list[dict[str, Any]]]:
        """label and score a row; for multi-label the labels over the threshold and every label's score."""
        return [*self._classes.decode(found[0])]

    def baseline(self, train: Dataset, test: Dataset, processor: Any) -> dict[str, float]:
        """The metrics of always answering the training rows' majority class, label set, or mean."""
        import numpy as np

        return self._classes.baseline(np.asarray(train["labels"][:]), np.asarray(test["labels"][:]))
