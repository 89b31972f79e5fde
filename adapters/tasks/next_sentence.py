"""Next sentence: whether one text follows another; pairs drawn from documents, or given ready."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from adapters import corruption, metrics
from adapters.classes import Classes
from adapters.contracts import Draw
from adapters.data import need_column, texts_in
from adapters.errors import DataError, RequestError, message
from adapters.labels import named
from adapters.options import check_types

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

LABELS = ("is_next", "not_next")  # in BERT's order
OTHERS = 4  # sentences of other documents that a sentence may be paired with
SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[.!?…][\"')])\s+")


def sentences(text: str) -> list[str]:
    """The sentences of a document: its lines where it has several, else divided after full stops and the like."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines if len(lines) > 1 else [part for part in SENTENCE_END.split(text.strip()) if part]


@final
@dataclass(frozen=True)
class NextSentence:
    """Two texts to whether the second follows the first.

    Attributes:
        max_length: tokens that a pair is cut to, the longer text first; None for as many as tokenizer and model take.
        order: the wrong pairs are right ones turned round (sentence order, Lan et al., 2020), instead of a sentence
            and one of another document (Devlin et al., 2019).
    """

    name: ClassVar[str] = "next-sentence"
    auto_class: ClassVar[str] = "AutoModelForNextSentencePrediction"
    pipeline: ClassVar[str] = "text-classification"
    processor: ClassVar[str] = "AutoTokenizer"
    columns: ClassVar[Mapping[str, str]] = {
        "first": "the first text of a pair",
        "second": "the text that may follow it",
        "label": f"{LABELS[0]} or {LABELS[1]}",
        "text": "instead of pairs: a document, a sentence a line or divided at full stops",
    }
    apart: ClassVar[tuple[str, ...]] = ("text", "first")

    max_length: int | None = None
    order: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if self.max_length is not None and self.max_length <= 4:
            expected = "a number of tokens > 4"
            corruption.refuse([message("a wrong value", where="max_length", expected=expected, found=self.max_length)])

    # ------------------------------------------------------------------ the model

    @property
    def best_metric(self) -> tuple[str, bool]:
        """The accuracy."""
        return "accuracy", True

    @property
    def stratum(self) -> str | None:
        """The label, where the rows have one."""
        return "label"

    def complete(self, model: PreTrainedModel) -> Self:
        """Nothing is left open."""
        return self

    def config(self) -> dict[str, Any]:
        """The names of the two outputs."""
        return {"id2label": dict(enumerate(LABELS)), "label2id": {label: n for n, label in enumerate(LABELS)}}

    def head(self, model: PreTrainedModel) -> set[str]:
        """What lies outside the base model; the pooler below it is the backbone's."""
        from adapters.anatomy import outside_backbone

        return outside_backbone(model)

    def describe(self) -> str:
        """What a wrong pair is."""
        return f"{self.name}, wrong pairs {'turned round' if self.order else 'from other documents'}"

    # ------------------------------------------------------------------ the rows

    @property
    def _classes(self) -> Classes:
        return Classes(LABELS)

    def with_rows(self, rows: Dataset) -> Self:
        """Nothing is read off the rows."""
        return self

    def with_data(self, rows: Dataset) -> Self:
        """Nothing depends on them."""
        return self

    def check(self, rows: Dataset, *, labelled: bool) -> None:
        """Look at every raw row before anything is loaded.

        Raises:
            DataError: neither pairs nor documents, or both; a row that is not text; a label that is missing or
                unknown; documents from which no pair can be drawn.
        """
        names = set(rows.column_names)
        if "text" in names and names & {"first", "second"}:
            raise DataError(
                message(
                    "documents and pairs in one set",
                    where="data",
                    expected="the column text, or first and second",
                    found=", ".join(rows.column_names),
                )
            )
        if labelled and "text" in names:
            self._documents(rows)
            return
        for column in ("first", "second"):
            need_column(rows, column)
            texts_in(rows[column], column)
        if labelled:
            self._classes.check(rows)

    def _documents(self, rows: Dataset) -> list[list[str]]:
        """The sentences of each document."""
        found = [sentences(text) for text in texts_in(rows["text"], "text")]
        usable = sum(len(document) > 1 for document in found)
        if not usable:
            raise DataError(
                message(
                    "no document has two sentences",
                    where="column 'text'",
                    expected="documents, a sentence a line or divided at full stops",
                )
            )
        if len(found) == 1 and not self.order:
            raise DataError(
                message(
                    "one document has no other to take wrong sentences from",
                    where="column 'text'",
                    expected="a row a document",
                    remedy="Divide it into several rows, or take order=True.",
                )
            )
        return found

    def prepare(
        self, rows: Dataset, processor: Any, model: PreTrainedModel, *, labelled: bool
    ) -> tuple[Dataset, list[str]]:
        """Ready pairs as model inputs with labels; of documents each two neighbouring sentences.

        Returns:
            A data set with input_ids, token_type_ids and labels (0: is next), or with first, second (token ids) and
            others (of other documents), from which a pair is drawn in every epoch; and length and row. And remarks.

        Raises:
            DataError: see `check`; token ids that the model does not have.
        """
        from adapters import tokens

        if "input_ids" in rows.column_names:
            prepared = tokens.taken(rows, model, labelled=labelled)
            if labelled:
                self._classes.check_prepared(prepared)
            return prepared, []
        if {"first", "second", "others"} <= set(rows.column_names) and "length" in rows.column_names:
            return rows, []
        tokens.need_tokenizer(processor)
        self.check(rows, labelled=labelled)
        limit = tokens.limit_of(self.max_length, processor, model)
        if labelled and "text" in rows.column_names:
            return self._neighbours(self._documents(rows), processor, model, limit)
        columns, cut = tokens.encode(
            list(rows["first"]), list(rows["second"]), processor, model, max_length=self.max_length
        )
        if labelled:
            columns["labels"] = [self._classes.target(named(rows, cell), n) for n, cell in enumerate(rows["label"])]
        return tokens.numbered(columns), tokens.cut_remark(cut, len(rows), limit)

    def _neighbours(
        self, documents: Sequence[Sequence[str]], processor: Any, model: PreTrainedModel, limit: int
    ) -> tuple[Dataset, list[str]]:
        """Each two neighbouring sentences, and sentences of other documents that may stand for the second."""
        from datasets import Dataset

        from adapters import frames, tokens

        size = frames.frame_of(processor, 2).size
        if limit - size < 2:
            raise RequestError(
                message("no room for two texts", where="max_length", expected=f"more than {size + 1}", found=limit)
            )
        flat = frames.bare([sentence for document in documents for sentence in document], processor, model)
        columns: dict[str, list[Any]] = {"first": [], "second": [], "others": [], "length": []}
        start, cut = 0, 0
        for document in documents:
            end = start + len(document)
            for place in range(start, end - 1):
                others: list[list[int]] = []
                if not self.order:
                    generator = Draw(corruption.FIXED).generator(place)
                    picks = generator.integers(0, len(flat) - len(document), OTHERS)
                    others = [flat[pick if pick < start else pick + len(document)] for pick in picks.tolist()]
                first, second = flat[place], flat[place + 1]
                longest = len(first) + max(map(len, [second, *others])) + size
                cut += longest > limit
                for name, value in (("first", first), ("second", second), ("others", others)):
                    columns[name].append(value)
                columns["length"].append(min(longest, limit))
            start = end
        remarks = tokens.cut_remark(cut, len(columns["first"]), limit)
        alone = sum(len(document) < 2 for document in documents)
        if alone:
            remarks.append(f"{alone} of {len(documents)} documents have one sentence and make no pair")
        return Dataset.from_dict({**columns, "row": list(range(len(columns["first"])))}), remarks

    # ------------------------------------------------------------------ batches, losses, answers

    def collate(
        self, features: Sequence[Mapping[str, Any]], model: PreTrainedModel, processor: Any, draw: Draw | None = None
    ) -> dict[str, Any]:
        """Right-padded batch: input_ids, attention_mask, token_type_ids (rows, longest), labels (rows,)."""
        from adapters import frames, tokens

        if "others" in features[0]:
            frame = frames.frame_of(processor, 2)
            room = tokens.limit_of(self.max_length, processor, model) - frame.size
            drawn = []
            for feature in features:
                first, second, label = self._pair(feature, draw)
                kept = frames.pair_cut(len(first), len(second), room)
                pair = frame.around(first[: kept[0]], second[: kept[1]])
                drawn.append({**pair, "labels": label, "row": feature["row"]})
            features = drawn
        batch = tokens.padded(features, model)
        if "labels" in features[0]:
            batch["labels"] = self._classes.targets(features)
        return batch

    def _pair(self, feature: Mapping[str, Any], draw: Draw | None) -> tuple[list[int], list[int], int]:
        """The pair of an epoch and its label: a right one half of the time; without a draw always the same."""
        generator = (draw or Draw(corruption.FIXED)).generator(feature["row"])
        first, second = feature["first"], feature["second"]
        if generator.random() < 0.5:
            return first, second, 0
        if self.order:
            return second, first, 1
        return first, feature["others"][int(generator.integers(0, len(feature["others"])))], 1

    def items(self, labels: Tensor) -> int:
        """The pairs."""
        return labels.numel()

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Cross-entropy; see `Classes.loss`."""
        return self._classes.loss(outputs.logits, labels, num_items_in_batch)

    def measured(
        self, outputs: Any, batch: Mapping[str, Any], model: PreTrainedModel, processor: Any
    ) -> tuple[Tensor, ...]:
        """The logits, shape (rows, 2), and the labels, shape (rows,)."""
        return outputs.logits, batch["labels"]

    def metrics(self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, processor: Any) -> dict[str, float]:
        """Accuracy and macro F1."""
        return metrics.classification(found[0].argmax(-1), found[1], len(LABELS))

    def findings(
        self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, raw: Dataset | None, processor: Any
    ) -> dict[str, Any]:
        """Matrix, scores by label, calibration and the surest errors."""
        from adapters import findings

        def shown(row: int) -> dict[str, Any]:
            entry = rows[row]
            if "others" in entry:
                texts = [processor.decode(ids) for ids in self._pair(entry, None)[:2]]
            elif raw is not None:
                texts = [raw[int(entry["row"])][side] for side in ("first", "second")]
            else:
                texts = [processor.decode(entry["input_ids"]), ""]
            return {"row": int(entry["row"]), "text": findings.cut(texts[0]), "pair": findings.cut(texts[1])}

        return self._classes.findings(found[0], found[1], shown)

    def answered(self, model: PreTrainedModel, batch: Mapping[str, Any], processor: Any) -> tuple[Tensor, ...]:
        """The logits, shape (rows, 2)."""
        return (model(**batch).logits,)

    def decode(
        self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, processor: Any
    ) -> list[dict[str, Any] | list[dict[str, Any]]]:
        """label and score a pair."""
        return [*self._classes.decode(found[0])]

    def baseline(self, train: Dataset, test: Dataset, processor: Any) -> dict[str, float]:
        """The metrics of always answering what most training pairs are."""
        return self._classes.baseline(self._truth(train), self._truth(test))

    def _truth(self, rows: Dataset) -> np.ndarray[Any, Any]:
        """The labels of prepared rows, drawn as for evaluation where the rows are sentences."""
        import numpy as np

        return np.asarray(rows["labels"] if "labels" in rows.column_names else [self._pair(r, None)[2] for r in rows])
