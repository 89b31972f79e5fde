"""Image classification: one label, several labels, or a number for a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from adapters import progress, reading
from adapters.classes import Classes
from adapters.data import need_column, pictures
from adapters.errors import RequestError, message, nearest
from adapters.labels import named
from adapters.options import check_types
from adapters.pixels import AUGMENTS

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.contracts import Draw

TOP = 5  # labels of an answer, as transformers' pipeline gives them


@final
@dataclass(frozen=True)
class ImageClassification:
    """Pictures to labels or to a number.

    Attributes:
        labels: the label names in the order of the head's outputs; empty for regression.
        problem: "single-label", "multi-label" or "regression".
        augment: how training pictures vary from epoch to epoch: "none", "flip" (left and right swapped in half of the
            cases), "crop" (a part of the picture; a picture of up to 64 pixels is shifted instead) or "standard" (crop
            and flip). Never while evaluating. "none" unless asked for: flipped digits and letters are others.
        interpolate_pos_encoding: the model fits its position embeddings to pictures of another size than it was
            trained on; for models that can. Whoever runs the merged model must ask for it too.
        class_weights: None, "balanced" (inverse to frequency in the training rows, 1 on average), or label -> weight.
        label_smoothing: share of the target spread over all labels (Szegedy et al., 2016).
        threshold: the probability from which a label counts as given in the metrics (multi-label).
        pooling: which hidden state the output layer reads: "own" (the model class's way), the "first" (the class
            token, where the model has one) or the "mean" of all places, the class token included; None for "own", or
            what a solved probe chooses.
        layer: how many blocks run below the head, 1 to all of them; None for all, or what a solved probe chooses.
    """

    name: ClassVar[str] = "image-classification"
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    pipeline: ClassVar[str] = "image-classification"
    processor: ClassVar[str] = "AutoImageProcessor"
    columns: ClassVar[Mapping[str, str]] = {
        "image": "a path, bytes, or a picture",
        "label": "a label's name, a list of names, or a number",
    }
    apart: ClassVar[tuple[str, ...]] = ("image",)

    labels: tuple[str, ...] = ()
    problem: str = "single-label"
    augment: str = "none"
    interpolate_pos_encoding: bool = False
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
        faults = self._classes.faults() + reading.faults(self.pooling, self.layer, reading.OF_PICTURES)
        if self.augment not in AUGMENTS:
            remedy = nearest(self.augment, AUGMENTS)
            faults.append(message(f"unknown augment {self.augment!r}", where="augment", remedy=remedy))
        if faults:
            raise RequestError(*faults)

    @property
    def _classes(self) -> Classes:
        return Classes(self.labels, self.problem, self.class_weights, self.label_smoothing, self.threshold)

    @property
    def _inputs(self) -> dict[str, Any]:
        return {"interpolate_pos_encoding": True} if self.interpolate_pos_encoding else {}

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
            RequestError: no labels anywhere, a head of another size, a model that cannot interpolate.
        """
        import inspect

        if self.interpolate_pos_encoding and self._inputs.keys() - inspect.signature(model.forward).parameters.keys():
            raise RequestError(
                message(
                    "the model has no position embeddings to interpolate, or does it unasked",
                    where=f"interpolate_pos_encoding on {type(model).__name__}",
                    remedy="Leave the option out.",
                )
            )
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
        """Open every picture and look at every label before anything is loaded.

        Raises:
            DataError: a missing column, a picture that cannot be read, a label that is missing or unknown.
            MissingPackageError: Pillow is not installed.
        """
        self._looked_at(rows, labelled=labelled)

    def _looked_at(self, rows: Dataset, *, labelled: bool) -> str:
        from adapters import images

        need_column(rows, "image")
        with progress.Job("checking pictures", len(rows), "pictures") as job:
            remark = images.check(pictures(rows), seen=job.advance)
        if labelled:
            self._classes.check(rows)
        return remark

    def prepare(
        self, rows: Dataset, processor: Any, model: PreTrainedModel, *, labelled: bool
    ) -> tuple[Dataset, list[str]]:
        """Pictures as references or bytes, and labels; pixels are made batch by batch.

        Returns:
            A data set with image (or pixel_values, where the rows hold them), labels (class number, 0/1 row, or
            number), length (1) and row (its number), in the order of `rows`; and remarks to be said once.

        Raises:
            DataError: a missing column, a picture that cannot be read, a label that is missing or unknown.
            RequestError: no image processor, or one whose pixels the model does not take.
        """
        from datasets import Dataset

        from adapters import pixels

        if "pixel_values" in rows.column_names:
            prepared = pixels.taken(rows, model, self._inputs, labelled=labelled)
            if labelled:
                self._classes.check_prepared(prepared)
            given = self.augment != "none"
            return prepared, ["the rows hold pixels already: augment changes nothing"] if given else []
        pixels.need_processor(processor)
        remark = self._looked_at(rows, labelled=labelled)
        kept = pictures(rows).select_columns("image")
        pixels.refuse_unfit(kept, processor, model, self._inputs)
        columns: dict[str, list[Any]] = {"image": list(kept["image"])}
        columns |= {"length": [1] * len(rows), "row": list(range(len(rows)))}
        if labelled:
            classes = self._classes
            columns["labels"] = [classes.target(named(rows, cell), n) for n, cell in enumerate(rows["label"])]
        return pictures(Dataset.from_dict(columns)), [remark] if remark else []

    # ------------------------------------------------------------------ batches, losses, answers

    def collate(
        self, features: Sequence[Mapping[str, Any]], model: PreTrainedModel, processor: Any, draw: Draw | None = None
    ) -> dict[str, Any]:
        """One batch: pixel_values (rows, channels, height, width), labels (rows,) or (rows, labels)."""
        import torch

        from adapters import images, pixels

        if "pixel_values" in features[0]:
            values = [torch.as_tensor(feature["pixel_values"]) for feature in features]
            batch: dict[str, Any] = {"pixel_values": torch.stack(values).to(model.dtype)}
        else:
            mode = pixels.mode_of(model)
            found = [images.opened(feature["image"], f"row {feature['row']}").convert(mode) for feature in features]
            if draw is not None and self.augment != "none":
                found = [
                    pixels.augmented(picture, self.augment, draw.generator(feature["row"]))
                    for picture, feature in zip(found, features, strict=True)
                ]
            batch = dict(pixels.made(found, processor, model))
        batch |= self._inputs
        if "row" in features[0]:
            batch["row"] = [feature["row"] for feature in features]
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

        from adapters import findings, images

        held = pictures(rows) if "image" in rows.column_names else None

        def shown(row: int) -> dict[str, Any]:
            number = int(rows[row]["row"])
            picture = images.thumbnail(held[row]["image"], f"row {number}") if held is not None else None
            return {"row": number, "image": picture}

        return self._classes.findings(found[0], np.asarray(rows["labels"][:]), shown, findings.PICTURES)

    def answered(self, model: PreTrainedModel, batch: Mapping[str, Any], processor: Any) -> tuple[Tensor, ...]:
        """The logits, shape (rows, labels)."""
        return (model(**batch).logits,)

    def decode(
        self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, processor: Any
    ) -> list[dict[str, Any] | list[dict[str, Any]]]:
        """The best labels and their scores, at most five, the best first."""
        return [*self._classes.ranked(found[0], TOP)]

    def baseline(self, train: Dataset, test: Dataset, processor: Any) -> dict[str, float]:
        """The metrics of always answering the training rows' majority class, label set, or mean."""
        import numpy as np

        return self._classes.baseline(np.asarray(train["labels"][:]), np.asarray(test["labels"][:]))
