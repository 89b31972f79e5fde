"""The outputs of a classification head: label names, problem, loss, metrics, answers; for texts and images alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, cast, final

from adapters import findings, metrics
from adapters.data import need_column
from adapters.errors import DataError, RequestError, message, nearest
from adapters.labels import class_names, named, names_in, number_in, one_kind, one_name, refuse_one_class

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


@final
@dataclass(frozen=True)
class Classes:
    """What a head's outputs mean.

    Attributes:
        labels: the label names in the order of the outputs; empty for regression.
        problem: "single-label", "multi-label" or "regression".
        class_weights: None, "balanced" (inverse to frequency in the training rows, 1 on average), or label -> weight.
        label_smoothing: share of the target spread over all labels (Szegedy et al., 2016).
        threshold: the probability from which a label counts as given (multi-label).
    """

    labels: tuple[str, ...] = ()
    problem: str = "single-label"
    class_weights: Mapping[str, float] | str | None = None
    label_smoothing: float = 0.0
    threshold: float = 0.5

    def faults(self) -> list[str]:
        """Everything that is wrong with these values, one message each."""
        found = []
        twice = [label for label, times in Counter(self.labels).items() if times > 1]
        if twice:
            found.append(message("a label twice", where="labels", found=repr(twice[0])))
        if self.problem == "single-label" and (fault := one_name(self.labels)):
            found.append(fault)
        if self.problem not in PROBLEMS:
            found.append(
                message(f"unknown problem {self.problem!r}", where="problem", remedy=nearest(self.problem, PROBLEMS))
            )
        if self.problem == "regression" and self.labels:
            found.append(message("a regression has no label names", where="labels", found=list(self.labels)[:3]))
        for option, fine, expected in (
            ("label_smoothing", 0 <= self.label_smoothing < 1, "a share from 0 to below 1"),
            ("threshold", 0 < self.threshold < 1, "a probability between 0 and 1"),
        ):
            if not fine:
                found.append(message("a wrong value", where=option, expected=expected, found=getattr(self, option)))
        if self.label_smoothing and self.problem == "regression":
            found.append(message("label smoothing needs labels", where="label_smoothing", found="a regression"))
        return found + self._weight_faults()

    def _weight_faults(self) -> list[str]:
        weights = self.class_weights
        if weights is None:
            return []
        if self.problem != "single-label":
            return [message("class weights need one label a row", where="class_weights", found=self.problem)]
        if isinstance(weights, str):
            if weights == "balanced":
                return []
            expected = '"balanced" or label -> weight'
            return [message("a wrong value", where="class_weights", expected=expected, found=repr(weights))]
        if not all(0 <= weight < float("inf") for weight in weights.values()):
            return [message("a wrong value", where="class_weights", expected="weights >= 0", found=dict(weights))]
        if self.labels and set(weights) != set(self.labels):
            odd = sorted(set(weights) ^ set(self.labels))[:3]
            return [message("weights for other labels than the task's", where="class_weights", found=odd)]
        return []

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
        """The head's size and label names.

        Raises:
            RequestError: no labels are given.
        """
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

    def describe(self) -> str:
        """Problem and labels."""
        if self.problem == "regression":
            return "a number"
        shown = ", ".join(self.labels[:4]) + (" ..." if len(self.labels) > 4 else "")
        return f"{self.problem}: {len(self.labels)} labels ({shown})"

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
        for number, value in enumerate(rows["label"][:]):
            for name in names_in(value, number, (), many=self.problem == "multi-label", check=False):
                found.setdefault(name, number)
        one_kind(found)
        if self.problem == "single-label":
            refuse_one_class(sorted(found), ())
        if len(rows) >= 20 and len(found) * 2 > len(rows) and self.problem == "single-label":
            raise DataError(
                message(
                    f"{len(found)} different labels in {len(rows)} rows",
                    where="column 'label'",
                    remedy="For numbers say problem='regression'; for several labels a row problem='multi-label'.",
                )
            )
        return tuple(sorted(found))

    def balanced(self, rows: Dataset) -> Mapping[str, float] | str | None:
        """The class weights, "balanced" made concrete for these training rows (raw, or prepared with "labels").

        Raises:
            DataError: all rows have one label.
        """
        if self.problem != "single-label":
            return self.class_weights
        if "label" in rows.column_names:
            cells = enumerate(rows["label"][:])
            counts = Counter(names_in(named(rows, cell), n, self.labels, many=False)[0] for n, cell in cells)
        else:
            need_column(rows, "labels")
            counts = Counter(self.labels[number] for number in rows["labels"][:])
        present = [label for label in self.labels if counts[label]]
        refuse_one_class(present, self.labels)
        if self.class_weights != "balanced":
            return self.class_weights
        weights = {label: len(rows) / (len(present) * counts[label]) for label in present}
        return {label: weights.get(label, 0.0) for label in self.labels}

    def check(self, rows: Dataset) -> None:
        """Look at every label.

        Raises:
            DataError: a label that is missing or unknown, with its row.
        """
        need_column(rows, "label")
        for number, value in enumerate(rows["label"][:]):
            self.target(named(rows, value), number)

    def check_prepared(self, rows: Dataset) -> None:
        """The same for the column "labels" of prepared rows: class numbers."""
        if self.problem == "single-label":
            for number, label in enumerate(rows["labels"][:]):
                if not isinstance(label, int) or not 0 <= label < len(self.labels):
                    raise DataError(
                        message(
                            "a label that is not there",
                            where=f"row {number}, column 'labels'",
                            expected=f"a number from 0 to {len(self.labels) - 1}",
                            found=repr(label),
                        )
                    )

    def target(self, value: Any, row: int) -> int | float | list[float]:
        """What the loss compares with: a class number, a number, or 0 and 1 for each label."""
        if self.problem == "regression":
            return number_in(value, row)
        names = names_in(value, row, self.labels, many=self.problem == "multi-label")
        if self.problem == "multi-label":
            return [float(label in names) for label in self.labels]
        return self.labels.index(names[0])

    # ------------------------------------------------------------------ losses, numbers, answers

    def targets(self, features: Sequence[Mapping[str, Any]]) -> Tensor:
        """The labels of a batch: shape (rows,), or (rows, labels) for multi-label."""
        import torch

        kind = torch.long if self.problem == "single-label" else torch.float32
        return torch.as_tensor([feature["labels"] for feature in features], dtype=kind)

    def loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Cross-entropy, binary cross-entropy or squared error: the sum over the batch, divided by the items of the
        whole global batch, so that any split into micro-batches gives the same gradient.

        Args:
            logits: shape (rows, labels).
            labels: shape (rows,) or, for multi-label, (rows, labels).
            num_items_in_batch: label entries in the global batch; None means this batch alone.
        """
        import torch
        from torch.nn import functional

        logits = logits.float()
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
        if self.problem == "regression":
            return metrics.regression(logits.reshape(-1).astype("float64"), labels.reshape(-1).astype("float64"))
        if self.problem == "multi-label":
            return metrics.multi_label((_sigmoid(logits) >= self.threshold).astype(int), labels.astype(int))
        return metrics.classification(logits.argmax(-1), labels, len(self.labels))

    def decode(self, logits: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
        """label and score a row; for multi-label the labels over the threshold and every label's score."""
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
        probabilities = _softmax(logits)
        best = probabilities.argmax(-1)
        return [
            {"label": self.labels[index], "score": float(row[index])}
            for index, row in zip(best, probabilities, strict=True)
        ]

    def ranked(self, logits: np.ndarray[Any, Any], top: int) -> list[list[dict[str, Any]]]:
        """The labels of each row with their scores, the best first, as transformers' image pipeline gives them.

        Scores are probabilities; a regression's is the number itself, under the name that transformers gives it.

        Args:
            logits: shape (rows, labels).
            top: how many labels at most.
        """
        if self.problem == "regression":
            scores = logits.reshape(-1, 1)
        else:
            scores = _sigmoid(logits) if self.problem == "multi-label" else _softmax(logits)
        names = self.labels or ("LABEL_0",)
        return [
            [{"label": names[index], "score": float(row[index])} for index in (-row).argsort(kind="stable")[:top]]
            for row in scores
        ]

    def findings(
        self,
        logits: np.ndarray[Any, Any],
        labels: np.ndarray[Any, Any],
        make: Callable[[int], Mapping[str, Any]],
        most: int = findings.ERRORS,
    ) -> dict[str, Any]:
        """What a report shows of answers.

        Args:
            logits: shape (rows, labels); labels: as `metrics` takes them.
            make: what is shown of a row, beside what was right and what was answered.
            most: of the worst rows.
        """
        import numpy as np

        if self.problem == "regression":
            said, right = logits.reshape(-1).astype("float64"), labels.reshape(-1).astype("float64")

            def number(row: int) -> dict[str, Any]:
                return {"expected": f"{right[row]:.4g}", "said": f"{said[row]:.4g}", **make(row)}

            far = np.abs(said - right)
            shown = findings.worst(far, far > 0, number, most)
            errors = {**shown, "count": None, "title": "Rows that are furthest off"}
            return {"scatter": findings.scatter(said, right), "errors": errors}
        if self.problem == "multi-label":
            scores = _sigmoid(logits)
            given, right = scores >= self.threshold, labels.astype(bool)

            def several(row: int) -> dict[str, Any]:
                names = [[n for n, has in zip(self.labels, side[row], strict=True) if has] for side in (right, given)]
                return {"expected": ", ".join(names[0]) or "none", "said": ", ".join(names[1]) or "none", **make(row)}

            sure = np.where(given, scores, 1 - scores)
            wrong = given != right
            return {
                "scores": findings.per_label(given.astype(int), right.astype(int), self.labels),
                "calibration": findings.calibration(sure.reshape(-1), ~wrong.reshape(-1), "labels, given or left out"),
                "errors": findings.worst((wrong * sure).sum(-1), wrong.any(-1), several, most),
            }
        scores = _softmax(logits)
        best, sure = scores.argmax(-1), scores.max(-1)

        def one(row: int) -> dict[str, Any]:
            names = {"expected": self.labels[int(labels[row])], "said": self.labels[int(best[row])]}
            return {**names, "score": round(float(sure[row]), 4), **make(row)}

        return {
            "confusion": findings.confusion(best.tolist(), labels.tolist(), self.labels),
            "scores": findings.per_label(best, labels, self.labels),
            "calibration": findings.calibration(sure, best == labels, "answers"),
            "errors": findings.worst(sure, best != labels, one, most),
        }

    def baseline(self, seen: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> dict[str, float]:
        """The metrics of always answering the majority class, label set, or mean of the training labels `seen`."""
        import numpy as np

        if self.problem == "regression":
            logits = np.full((len(truth), 1), seen.mean())
        elif self.problem == "multi-label":
            logits = np.tile(np.where(seen.mean(0) >= self.threshold, 20.0, -20.0), (len(truth), 1))
        else:
            counts = np.bincount(seen, minlength=len(self.labels))
            logits = np.tile(counts, (len(truth), 1))
        return self.metrics(logits, truth)


def _softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import numpy as np

    shifted = np.exp(logits.astype("float64") - logits.max(-1, keepdims=True))
    return cast("np.ndarray[Any, Any]", shifted / shifted.sum(-1, keepdims=True))


def _sigmoid(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    from scipy.special import expit

    return cast("np.ndarray[Any, Any]", expit(logits.astype("float64")))
