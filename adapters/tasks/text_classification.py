"""Text classification: one label, several labels, or a number for a text or a pair of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast, final

from adapters.contracts import check_types
from adapters.data import need_column, texts_in
from adapters.errors import DataError, RequestError, message, nearest
from adapters.labels import class_names, named, names_in, number_in, one_kind

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

PROBLEMS = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
CHUNK = 1000  # rows tokenised at once


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
    """

    name: ClassVar[str] = "text-classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    columns: ClassVar[Mapping[str, str]] = {
        "text": "the text",
        "text_pair": "the second text of a pair (optional)",
        "label": "a label's name, a list of names, or a number",
    }

    labels: tuple[str, ...] = ()
    problem: str = "single-label"
    max_length: int | None = None
    class_weights: Mapping[str, float] | str | None = None
    label_smoothing: float = 0.0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.labels, str):
            raise RequestError(message("one text instead of names", where="labels", found=repr(self.labels)))
        if isinstance(self.labels, list | tuple):
            object.__setattr__(self, "labels", tuple(str(label) for label in self.labels))
        check_types(self)
        faults = []
        if self.labels:
            twice = [label for label, times in Counter(self.labels).items() if times > 1]
            if twice:
                faults.append(message("a label twice", where="labels", found=repr(twice[0])))
        if self.problem not in PROBLEMS:
            faults.append(
                message(f"unknown problem {self.problem!r}", where="problem", remedy=nearest(self.problem, PROBLEMS))
            )
        if self.problem == "regression" and self.labels:
            faults.append(message("a regression has no label names", where="labels", found=list(self.labels)[:3]))
        for option, fine, expected in (
            ("label_smoothing", 0 <= self.label_smoothing < 1, "a share from 0 to below 1"),
            ("threshold", 0 < self.threshold < 1, "a probability between 0 and 1"),
            ("max_length", self.max_length is None or self.max_length > 2, "a number of tokens > 2"),
        ):
            if not fine:
                faults.append(message("a wrong value", where=option, expected=expected, found=getattr(self, option)))
        if self.label_smoothing and self.problem == "regression":
            faults.append(message("label smoothing needs labels", where="label_smoothing", found="a regression"))
        if self.class_weights is not None:
            if self.problem != "single-label":
                faults.append(message("class weights need one label a row", where="class_weights", found=self.problem))
            elif isinstance(self.class_weights, str):
                if self.class_weights != "balanced":
                    faults.append(
                        message(
                            "a wrong value",
                            where="class_weights",
                            expected='"balanced" or label -> weight',
                            found=repr(self.class_weights),
                        )
                    )
            elif not all(0 <= weight < float("inf") for weight in self.class_weights.values()):
                faults.append(
                    message(
                        "a wrong value", where="class_weights", expected="weights >= 0", found=dict(self.class_weights)
                    )
                )
            elif self.labels and set(self.class_weights) != set(self.labels):
                faults.append(
                    message(
                        "weights for other labels than the task's",
                        where="class_weights",
                        found=sorted(set(self.class_weights) ^ set(self.labels))[:3],
                    )
                )
        if faults:
            raise RequestError("; ".join(faults))

    # ------------------------------------------------------------------ the model

    @property
    def best_metric(self) -> tuple[str, bool]:
        """Accuracy for one label, macro F1 for several, the mean squared error for numbers."""
        return {
            "single-label": ("accuracy", True),
            "multi-label": ("macro_f1", True),
            "regression": ("mse", False),
        }[self.problem]

    def complete(self, model: PreTrainedModel) -> Self:
        """Labels and problem from the model's own head where they were left open.

        Raises:
            RequestError: no labels anywhere, or a head of another size.
        """
        id2label: Mapping[Any, str] = model.config.id2label or {}
        outputs = len(id2label)
        own_labels = tuple(str(id2label[index]) for index in sorted(id2label))
        if self.labels or self.problem == "regression":
            needed = len(self.labels) or 1
            if outputs != needed:
                raise RequestError(
                    message(
                        "the model's head has another size than the labels",
                        where=type(model).__name__,
                        expected=f"{needed} outputs",
                        found=f"{outputs}",
                        remedy=f"Load the model with num_labels={needed}, or adapt it by its id or folder.",
                    )
                )
            return self
        problem = {value: name for name, value in PROBLEMS.items()}.get(str(model.config.problem_type), self.problem)
        if problem == "regression" or (outputs == 1 and model.config.problem_type is None):
            return replace(self, problem="regression")
        return replace(self, labels=own_labels, problem=problem)

    def config(self) -> dict[str, Any]:
        """The head's size and label names."""
        if self.problem == "regression":
            return {"num_labels": 1, "problem_type": PROBLEMS[self.problem]}
        if not self.labels:
            raise RequestError(
                message(
                    "the labels are not given",
                    where="labels",
                    expected='their names, e.g. labels=["negative", "positive"]',
                    remedy="For numbers instead of labels say problem='regression'.",
                )
            )
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "problem_type": PROBLEMS[self.problem],
        }

    def head(self, model: PreTrainedModel) -> set[str]:
        """What lies outside the base model."""
        from adapters.anatomy import outside_backbone

        return outside_backbone(model)

    def describe(self) -> str:
        """Problem and labels."""
        if self.problem == "regression":
            return f"{self.name}: a number"
        shown = ", ".join(self.labels[:4]) + (" ..." if len(self.labels) > 4 else "")
        return f"{self.name}, {self.problem}: {len(self.labels)} labels ({shown})"

    # ------------------------------------------------------------------ the rows

    def labels_in(self, rows: Dataset) -> tuple[str, ...]:
        """The label names that training rows hold: the feature's own order, else sorted.

        Raises:
            DataError: no label column, or so many labels that they are numbers.
        """
        if self.problem == "regression":
            return ()
        need_column(rows, "label")
        names = class_names(rows)
        if names:
            return tuple(names)
        found: dict[str, int] = {}
        for number, value in enumerate(rows["label"]):
            for name in names_in(value, number, (), many=self.problem == "multi-label", check=False):
                found.setdefault(name, number)
        one_kind(found)
        if len(rows) >= 20 and len(found) * 2 > len(rows) and self.problem == "single-label":
            raise DataError(
                message(
                    f"{len(found)} different labels in {len(rows)} rows",
                    where="column 'label'",
                    remedy="For numbers say problem='regression'; for several labels a row problem='multi-label'.",
                )
            )
        return tuple(sorted(found))

    def with_data(self, rows: Dataset) -> Self:
        """Class weights "balanced" made concrete for these training rows."""
        if self.class_weights != "balanced":
            return self
        if "input_ids" in rows.column_names:
            counts = Counter(self.labels[number] for number in rows["labels"])
        else:
            need_column(rows, "label")
            cells = enumerate(rows["label"])
            counts = Counter(names_in(named(rows, cell), n, self.labels, many=False)[0] for n, cell in cells)
        present = [label for label in self.labels if counts[label]]
        weights = {label: len(rows) / (len(present) * counts[label]) for label in present}
        return replace(self, class_weights={label: weights.get(label, 0.0) for label in self.labels})

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
            need_column(rows, "label")
            for number, value in enumerate(rows["label"]):
                self._target(named(rows, value), number)

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
        from datasets import Dataset, concatenate_datasets

        from adapters.anatomy import longest_input

        if "input_ids" in rows.column_names:
            return self._prepared(rows, model, labelled), []
        if processor is None:
            raise RequestError(
                message("raw rows need a tokenizer", where="processor", remedy="Pass processor=AutoTokenizer....")
            )
        self.check(rows, labelled=labelled)
        limit = min(self.max_length or 1 << 20, longest_input(processor, model))
        vocabulary = model.config.get_text_config().vocab_size
        cut = 0
        parts = []
        pair = "text_pair" in rows.column_names
        for start in range(0, len(rows), CHUNK):
            batch = rows[start : start + CHUNK]
            texts, seconds = list(batch["text"]), list(batch["text_pair"]) if pair else None
            encoded = dict(processor(texts, seconds, truncation=True, max_length=limit))
            ids = cast("list[list[int]]", encoded["input_ids"])
            full = [index for index, row in enumerate(ids) if len(row) >= limit]
            if full:
                whole = processor(
                    [texts[i] for i in full],
                    [seconds[i] for i in full] if seconds else None,
                    truncation=False,
                    verbose=False,
                )["input_ids"]
                cut += sum(len(row) > limit for row in whole)
            for index, row in enumerate(ids):
                if not row or max(row) >= vocabulary:
                    raise DataError(
                        message(
                            "token ids that the model does not have" if row else "a row without tokens",
                            where=f"row {start + index}: {texts[index]!r}"[:160],
                            expected=f"ids below {vocabulary}",
                            found=max(row, default="none"),
                            remedy="Use the tokenizer that belongs to the model." if row else "Remove the row.",
                        )
                    )
            encoded["length"] = [len(row) for row in ids]
            encoded["row"] = list(range(start, start + len(ids)))
            if labelled:
                encoded["labels"] = [
                    self._target(named(rows, value), start + index) for index, value in enumerate(batch["label"])
                ]
            parts.append(Dataset.from_dict(encoded))
        remarks = []
        if cut:
            remarks.append(
                f"{cut} of {len(rows)} texts ({100 * cut / len(rows):.1f} %) are longer than {limit} tokens: cut there"
            )
        return concatenate_datasets(parts), remarks

    def _prepared(self, rows: Dataset, model: PreTrainedModel, labelled: bool) -> Dataset:
        """A set that holds model inputs already: checked, then taken as it is, with lengths and row numbers."""
        if labelled:
            need_column(rows, "labels")
        vocabulary = model.config.get_text_config().vocab_size
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        for number, ids in enumerate(rows["input_ids"]):
            if not 0 < len(ids) <= positions or min(ids) < 0 or max(ids) >= vocabulary:
                raise DataError(
                    message(
                        "prepared token ids that the model does not take",
                        where=f"row {number}, column 'input_ids'",
                        expected=f"1 to {positions} ids from 0 to {vocabulary - 1}",
                        found=f"{len(ids)} ids" + (f" from {min(ids)} to {max(ids)}" if ids else ""),
                    )
                )
        if labelled and self.problem == "single-label":
            for number, label in enumerate(rows["labels"]):
                if not isinstance(label, int) or not 0 <= label < len(self.labels):
                    raise DataError(
                        message(
                            "a label that is not there",
                            where=f"row {number}, column 'labels'",
                            expected=f"a number from 0 to {len(self.labels) - 1}",
                            found=repr(label),
                        )
                    )
        keep = {"input_ids", "attention_mask", "token_type_ids", "labels"}
        rows = rows.remove_columns([name for name in rows.column_names if name not in keep])
        rows = rows.add_column("length", [len(ids) for ids in rows["input_ids"]])
        return rows.add_column("row", list(range(len(rows))))

    def _target(self, value: Any, row: int) -> int | float | list[float]:
        if self.problem == "regression":
            return number_in(value, row)
        names = names_in(value, row, self.labels, many=self.problem == "multi-label")
        if self.problem == "multi-label":
            return [float(label in names) for label in self.labels]
        return self.labels.index(names[0])

    # ------------------------------------------------------------------ batches, losses, answers

    def collate(self, features: Sequence[Mapping[str, Any]], model: PreTrainedModel) -> dict[str, Any]:
        """Right-padded batch: input_ids, attention_mask (rows, longest), labels (rows,) or (rows, labels)."""
        import torch

        pad = model.config.get_text_config().pad_token_id or 0
        fills = {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0}
        batch: dict[str, Any] = {}
        for name, fill in fills.items():
            if name in features[0]:
                rows = [torch.as_tensor(feature[name], dtype=torch.long) for feature in features]
                batch[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
        if "attention_mask" not in batch:
            ones = [torch.ones(len(feature["input_ids"]), dtype=torch.long) for feature in features]
            batch["attention_mask"] = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True)
        if "labels" in features[0]:
            kind = torch.long if self.problem == "single-label" else torch.float32
            batch["labels"] = torch.as_tensor([feature["labels"] for feature in features], dtype=kind)
        if "row" in features[0]:
            batch["row"] = [feature["row"] for feature in features]
        return batch

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Cross-entropy, binary cross-entropy or squared error: the sum over the batch, divided by the items of the
        whole global batch, so that any split into micro-batches gives the same gradient.

        Args:
            outputs: with logits, shape (rows, labels).
            labels: shape (rows,) or, for multi-label, (rows, labels).
            num_items_in_batch: label entries in the global batch; None means this batch alone.
        """
        import torch
        from torch.nn import functional

        logits = outputs.logits.float()
        items = labels.numel() if num_items_in_batch is None else num_items_in_batch
        if self.problem == "regression":
            total = functional.mse_loss(logits.squeeze(-1), labels, reduction="sum")
        elif self.problem == "multi-label":
            smooth = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
            total = functional.binary_cross_entropy_with_logits(logits, smooth, reduction="sum")
        else:
            each = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
            if isinstance(self.class_weights, Mapping):
                weights = torch.tensor([self.class_weights[label] for label in self.labels], device=logits.device)
                each = each * weights[labels]
            total = each.sum()
        return total / items

    def metrics(self, logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> dict[str, float]:
        """Accuracy and macro F1; for regression Pearson's correlation and the mean squared error."""
        from adapters import metrics

        if self.problem == "regression":
            return metrics.regression(logits.reshape(-1).astype("float64"), labels.reshape(-1).astype("float64"))
        if self.problem == "multi-label":
            return metrics.multi_label((_sigmoid(logits) >= self.threshold).astype(int), labels.astype(int))
        return metrics.classification(logits.argmax(-1), labels, len(self.labels))

    def decode(self, logits: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
        """label and score a row; for multi-label the labels over the threshold and every label's score."""
        import numpy as np

        if self.problem == "regression":
            return [{"score": float(value)} for value in logits.reshape(-1)]
        if self.problem == "multi-label":
            return [
                {
                    "labels": [label for label, p in zip(self.labels, row, strict=True) if p >= self.threshold],
                    "scores": {label: float(p) for label, p in zip(self.labels, row, strict=True)},
                }
                for row in _sigmoid(logits)
            ]
        shifted = np.exp(logits.astype("float64") - logits.max(-1, keepdims=True))
        probabilities = shifted / shifted.sum(-1, keepdims=True)
        best = probabilities.argmax(-1)
        return [
            {"label": self.labels[index], "score": float(row[index])}
            for index, row in zip(best, probabilities, strict=True)
        ]

    def baseline(self, train: Dataset, test: Dataset) -> dict[str, float]:
        """The metrics of always answering the training rows' majority class, label set, or mean."""
        import numpy as np

        seen = np.asarray(train["labels"])
        truth = np.asarray(test["labels"])
        if self.problem == "regression":
            logits = np.full((len(truth), 1), seen.mean())
        elif self.problem == "multi-label":
            logits = np.tile(np.where(seen.mean(0) >= self.threshold, 20.0, -20.0), (len(truth), 1))
        else:
            counts = np.bincount(seen, minlength=len(self.labels))
            logits = np.tile(counts, (len(truth), 1))
        return self.metrics(logits, truth)


def _sigmoid(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    from scipy.special import expit

    return cast("np.ndarray[Any, Any]", expit(logits.astype("float64")))
