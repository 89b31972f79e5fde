"""Token classification: a tag for each word of a sentence; entities, parts of speech."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from adapters import metrics, reading, tags
from adapters.classes import Classes
from adapters.data import need_column
from adapters.errors import DataError, RequestError, message
from adapters.labels import named
from adapters.options import check_types
from adapters.tokens import length_faults

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.contracts import Draw

    Array = np.ndarray[Any, Any]

IGNORED = -100  # the label of a token that no word's tag is learnt at


@final
@dataclass(frozen=True)
class TokenClassification:
    """Sentences to a tag for each word.

    Attributes:
        labels: the tags in the order of the head's outputs.
        max_length: tokens that a row is cut to; None for as many as tokenizer and model take.
        label_all: every token of a word carries its tag, not the first alone; what is measured stays the first.
        label_smoothing: share of the target spread over all tags (Szegedy et al., 2016).
        layer: how many blocks run below the head, 1 to all of them; None for all, or what a solved probe chooses.
    """

    name: ClassVar[str] = "token-classification"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    pipeline: ClassVar[str] = "token-classification"
    processor: ClassVar[str] = "AutoTokenizer"
    columns: ClassVar[Mapping[str, str]] = {
        "tokens": "the words of a sentence, or a text to be answered",
        "tags": "a tag a word: names, or class numbers of a ClassLabel",
    }
    apart: ClassVar[tuple[str, ...]] = ("tokens",)

    labels: tuple[str, ...] = ()
    max_length: int | None = None
    label_all: bool = False
    label_smoothing: float = 0.0
    layer: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.labels, str):
            raise RequestError(message("one text instead of tags", where="labels", found=repr(self.labels)))
        if isinstance(self.labels, list | tuple):
            object.__setattr__(self, "labels", tuple(str(label) for label in self.labels))
        check_types(self)
        faults = self._classes.faults() + length_faults(self.max_length) + reading.faults(None, self.layer)
        if faults:
            raise RequestError(*faults)
        tags.scheme_of(self.labels)

    @property
    def _classes(self) -> Classes:
        return Classes(self.labels, label_smoothing=self.label_smoothing)

    @property
    def _marks_entities(self) -> bool:
        return tags.scheme_of(self.labels) != "plain"

    # ------------------------------------------------------------------ the model

    @property
    def best_metric(self) -> tuple[str, bool]:
        """F1 over entities; accuracy over words where the tags mark none."""
        return ("f1" if self._marks_entities else "accuracy", True)

    @property
    def stratum(self) -> str | None:
        """None: a sentence has many tags."""
        return None

    def complete(self, model: PreTrainedModel) -> Self:
        """The tags from the model's own head where they were left open.

        Raises:
            RequestError: a head of another size.
        """
        if self.labels:
            self._classes.complete(model)
            return self
        own: Mapping[Any, str] = model.config.id2label or {}
        return replace(self, labels=tuple(str(own[index]) for index in sorted(own)))

    def config(self) -> dict[str, Any]:
        """The head's size and the tags.

        Raises:
            RequestError: no tags are given.
        """
        if not self.labels:
            raise RequestError(
                message("the tags are not given", where="labels", expected='e.g. labels=["O", "B-PER", "I-PER"]')
            )
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
        }

    def head(self, model: PreTrainedModel) -> set[str]:
        """What lies outside the base model."""
        from adapters.anatomy import outside_backbone

        return outside_backbone(model)

    def describe(self) -> str:
        """The tags."""
        shown = ", ".join(self.labels[:4]) + (" ..." if len(self.labels) > 4 else "")
        return f"{self.name}, {len(self.labels)} tags ({shown}){reading.described(self)}"

    # ------------------------------------------------------------------ the rows

    def with_rows(self, rows: Dataset) -> Self:
        """The tags that training rows hold, O first, where none were given."""
        if self.labels:
            return self
        need_column(rows, "tags")
        try:
            return replace(self, labels=tags.found_in(rows))
        except RequestError as fault:
            raise DataError(f"column 'tags': {fault}") from fault

    def with_data(self, rows: Dataset) -> Self:
        """Nothing depends on the training rows but the tags."""
        return self

    def check(self, rows: Dataset, *, labelled: bool) -> None:
        """Look at every raw row before anything is loaded.

        Raises:
            DataError: a missing column, no words, not a tag for each word, a tag that is missing or unknown.
        """
        need_column(rows, "tokens")
        if labelled:
            need_column(rows, "tags")
            if self._marks_entities:
                metrics.need_seqeval()
        tags.check(rows, self.labels, labelled=labelled)

    def prepare(
        self, rows: Dataset, processor: Any, model: PreTrainedModel, *, labelled: bool
    ) -> tuple[Dataset, list[str]]:
        """Token ids of words or texts, and the tag of each word at its first token.

        Returns:
            A data set with input_ids, attention_mask, length and row; of each token its word, and the characters
            `begins` to `ends` of `text` (-1 for special tokens); `count` words (-1 for a text); and if labelled labels
            (a tag a token, or -100) and tags (a tag a word). And remarks to be said once.

        Raises:
            DataError: a missing column, no words, not a tag for each word, a tag that is missing or unknown.
        """
        from adapters import tokens, words

        if "input_ids" in rows.column_names:
            prepared = tokens.taken(rows, model, labelled=labelled)
            if labelled:
                self._check_prepared(prepared)
            return prepared, []
        tokens.need_fast(processor)
        self.check(rows, labelled=labelled)
        columns, remarks = words.encode(list(rows["tokens"]), processor, model, max_length=self.max_length)
        if labelled:
            names = [named(rows, cell, "tags") for cell in rows["tags"]]
            remarks = tags.remarks_on(names, tags.scheme_of(self.labels)) + remarks
            numbers = {label: number for number, label in enumerate(self.labels)}
            columns["tags"] = [[numbers[tag] for tag in cell] for cell in names]
            columns["labels"] = [
                self._targets(places, cell) for places, cell in zip(columns["words"], columns["tags"], strict=True)
            ]
        return tokens.numbered(columns), remarks

    def _targets(self, places: Sequence[int], cell: Sequence[int]) -> list[int]:
        """The label of each token: its word's tag at the first token of a word, or at all of them."""
        last, found = tags.UNSEEN, []
        for word in places:
            found.append(cell[word] if word >= 0 and (self.label_all or word != last) else IGNORED)
            last = word
        return found

    def _check_prepared(self, rows: Dataset) -> None:
        for number, (ids, labels) in enumerate(zip(rows["input_ids"], rows["labels"], strict=True)):
            fine = isinstance(labels, list) and len(labels) == len(ids)
            if not fine or not all(label == IGNORED or 0 <= label < len(self.labels) for label in labels):
                raise DataError(
                    message(
                        "labels that do not fit the tokens",
                        where=f"row {number}, column 'labels'",
                        expected=f"{len(ids)} numbers from 0 to {len(self.labels) - 1}, or {IGNORED}",
                        found=repr(labels)[:80],
                    )
                )

    # ------------------------------------------------------------------ batches, losses, answers

    def collate(
        self, features: Sequence[Mapping[str, Any]], model: PreTrainedModel, processor: Any, draw: Draw | None = None
    ) -> dict[str, Any]:
        """Right-padded batch: input_ids, attention_mask and labels, each (rows, longest)."""
        from adapters.tokens import padded

        named_columns = ("token_type_ids", "labels") if "labels" in features[0] else ("token_type_ids",)
        return padded(features, model, named_columns)

    def items(self, labels: Tensor) -> int:
        """Tokens that carry a tag."""
        return int((labels != IGNORED).sum())

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Cross-entropy over the tokens that carry a tag, divided by their number in the whole global batch."""
        counted = labels != IGNORED
        items = max(self.items(labels), 1) if num_items_in_batch is None else num_items_in_batch
        return self._classes.loss(outputs.logits[counted], labels[counted], items)

    def measured(
        self, outputs: Any, batch: Mapping[str, Any], model: PreTrainedModel, processor: Any
    ) -> tuple[Tensor, ...]:
        """The best tag of each token and its probability, each of shape (rows, longest)."""
        score, best = outputs.logits.float().softmax(-1).max(-1)
        return best, score

    def metrics(self, found: Sequence[Array], rows: Dataset, processor: Any) -> dict[str, float]:
        """Precision, recall and F1 over entities, and accuracy over words; macro F1 where no tag marks an entity.

        A word that was cut off, or that became no token, counts as answered O (as answered wrongly where there is no
        O), so that nothing looks better for being cut.
        """
        return self._numbers(_by_word(found[0], rows), [list(row) for row in _truth(rows)])

    def _numbers(self, answered: Sequence[Sequence[int]], truth: Sequence[Sequence[int]]) -> dict[str, float]:
        import numpy as np

        unseen = self.labels.index(tags.OUTSIDE) if tags.OUTSIDE in self.labels else len(self.labels)
        filled = [[unseen if tag == tags.UNSEEN else tag for tag in row] for row in answered]
        flat, right = (np.asarray([tag for row in side for tag in row], dtype=int) for side in (filled, truth))
        if not self._marks_entities:
            return metrics.classification(flat, right, len(self.labels))
        spelt = [tags.conll(label) for label in self.labels]
        if unseen == len(self.labels):
            spelt.append(tags.OUTSIDE)
        sides = ([[spelt[tag] for tag in row] for row in side] for side in (filled, truth))
        return {**metrics.entities(*sides), "accuracy": float((flat == right).mean()) if len(right) else 0.0}

    def findings(self, found: Sequence[Array], rows: Dataset, raw: Dataset | None, processor: Any) -> dict[str, Any]:
        """Scores of each kind of entity, the matrix of kinds over words, calibration, and the sentences most wrong."""
        import numpy as np

        from adapters import findings

        outside = self.labels.index(tags.OUTSIDE) if tags.OUTSIDE in self.labels else len(self.labels)
        said = [[outside if tag == tags.UNSEEN else int(tag) for tag in row] for row in _by_word(found[0], rows)]
        sure = [[0.0 if score < 0 else float(score) for score in row] for row in _by_word(found[1], rows)]
        right = [list(row) for row in _truth(rows)]
        flat, truth = (np.asarray([tag for row in side for tag in row], dtype=int) for side in (said, right))
        hits, certain = flat == truth, np.asarray([score for row in sure for score in row])
        seen = certain > 0  # a word that was cut off, or became no token, was answered without a certainty
        weights = [
            sum(s for tag, wanted, s in zip(*row, strict=True) if tag != wanted)
            for row in zip(said, right, sure, strict=True)
        ]
        bad = np.asarray([row != other for row, other in zip(said, right, strict=True)], dtype=bool)
        names = (*self.labels, "?")

        def shown(row: int) -> dict[str, Any]:
            number = int(rows[row]["row"])
            cell = raw[number]["tokens"] if raw is not None else [f"[{n}]" for n in range(len(right[row]))]
            first = max(0, next(n for n, (a, b) in enumerate(zip(said[row], right[row], strict=True)) if a != b) - 20)
            words = list(zip(cell, right[row], said[row], strict=True))[first : first + findings.WORDS]
            return {"row": number, "words": [[findings.cut(w, 60), names[a], names[b]] for w, a, b in words]}

        shown_errors = findings.worst(np.asarray(weights), bad, shown)
        result = {
            "calibration": findings.calibration(certain[seen], hits[seen], "words"),
            "errors": {**shown_errors, "title": "Sentences that are most wrong", "noun": "sentences"},
        }
        if not self._marks_entities:
            tagged = findings.confusion([*flat.tolist()], [*truth.tolist()], names)
            return {**result, "confusion": tagged, "scores": findings.per_label(flat, truth, self.labels)}
        kinds = list(dict.fromkeys(label.split("-", 1)[-1] for label in self.labels))
        of = [kinds.index(label.split("-", 1)[-1]) for label in self.labels] + [len(kinds)]
        pair = ([of[tag] for tag in flat], [of[tag] for tag in truth])
        spelt = [tags.conll(label) for label in self.labels] + [tags.OUTSIDE]
        sides = ([[spelt[tag] for tag in row] for row in side] for side in (said, right))
        return {**result, "confusion": findings.confusion(*pair, [*kinds, "?"]), "scores": metrics.by_entity(*sides)}

    def answered(self, model: PreTrainedModel, batch: Mapping[str, Any], processor: Any) -> tuple[Tensor, ...]:
        """The best tag of each token and its probability, each of shape (rows, longest)."""
        score, best = model(**batch).logits.float().softmax(-1).max(-1)
        return best, score

    def decode(
        self, found: Sequence[Array], rows: Dataset, processor: Any
    ) -> list[dict[str, Any] | list[dict[str, Any]]]:
        """For a text its entities (entity_group, score, word, start, end); for a list of words also a tag a word.

        The characters of a list of words are counted in the words joined by spaces; a word without a token has no tag
        (None).
        """
        if "text" not in rows.column_names:
            raise DataError(
                message("prepared token ids have no text to answer about", where="data", remedy="Give the raw rows.")
            )
        answers: list[dict[str, Any] | list[dict[str, Any]]] = []
        for best, score, row in zip(*found, rows, strict=True):
            places = [place for place, begin in enumerate(row["begins"]) if begin >= 0]
            pieces = [
                {
                    "entity": self.labels[int(best[place])],
                    "score": float(score[place]),
                    "word": _piece(row, place, processor),
                    "start": row["begins"][place],
                    "end": row["ends"][place],
                }
                for place in places
            ]
            entities = tags.grouped(pieces, processor.convert_tokens_to_string)
            if row["count"] < 0:
                answers.append(entities)
            else:
                starts = _starts((row["words"], row["count"]))
                given = [self.labels[int(best[place])] if place >= 0 else None for place in starts]
                answers.append({"tags": given, "entities": entities})
        return answers

    def baseline(self, train: Dataset, test: Dataset, processor: Any) -> dict[str, float]:
        """The metrics of giving every word the commonest tag of the training rows (O, in most sets)."""
        counts = Counter(tag for row in _truth(train) for tag in row)
        common = min(counts, key=lambda tag: (-counts[tag], tag))
        truth = [list(row) for row in _truth(test)]
        return self._numbers([[common] * len(row) for row in truth], truth)


def _by_word(found: Array, rows: Dataset) -> list[list[Any]]:
    """What was measured at the first token of each word; -1 for words without one."""
    return [
        [one[place].item() if place >= 0 else tags.UNSEEN for place in _starts(row)]
        for one, row in zip(found, _measured_columns(rows), strict=True)
    ]


def _truth(rows: Dataset) -> Any:
    """The tags of the words of each row; of sets that were prepared elsewhere those of the tokens that carry one."""
    if "tags" in rows.column_names:
        return rows["tags"]
    return ([label for label in row if label != IGNORED] for row in rows["labels"])


def _measured_columns(rows: Dataset) -> Any:
    """Each row's word numbers, token by token, and how many words it has."""
    if "words" in rows.column_names:
        return zip(rows["words"], rows["count"], strict=True)
    return ((_numbered(row), sum(label != IGNORED for label in row)) for row in rows["labels"])


def _numbered(labels: Sequence[int]) -> list[int]:
    """Word numbers for a row that was prepared elsewhere: each token that carries a label is a word."""
    count, numbers = 0, []
    for label in labels:
        numbers.append(count if label != IGNORED else tags.UNSEEN)
        count += label != IGNORED
    return numbers


def _starts(row: tuple[Sequence[int], int]) -> list[int]:
    """The place of each word's first token; -1 for words without one."""
    places, count = row
    starts = [tags.UNSEEN] * count
    for place in range(len(places) - 1, -1, -1):
        if places[place] >= 0:
            starts[places[place]] = place
    return starts


def _piece(row: Mapping[str, Any], place: int, processor: Any) -> str:
    """A token as text; one that the tokenizer does not know as it stands in the text."""
    if row["input_ids"][place] == processor.unk_token_id:
        return str(row["text"][row["begins"][place] : row["ends"][place]])
    return str(processor.convert_ids_to_tokens(row["input_ids"][place]))
