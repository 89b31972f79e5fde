"""Masked language modelling: hidden tokens predicted from those around them, on texts of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from adapters import cloze, corruption, likelihood
from adapters.contracts import Draw, Task
from adapters.data import need_column, texts_in
from adapters.errors import DataError, RequestError, message
from adapters.likelihood import IGNORED
from adapters.options import check_types

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

SAMPLES, SHOWN_WORDS = 3, 24  # rows of which a report fills in a word, and how much of them
TOP = 5  # answers a mask, as the fill-mask pipeline gives
SPECIAL = -1  # "words" of tokens that belong to none


@final
@dataclass(frozen=True)
class MaskedLM:
    """Texts, some of whose tokens are hidden, to those tokens.

    Attributes:
        max_length: tokens that a row is cut to; None for as many as tokenizer and model take.
        packing: texts one after the other in blocks of max_length, so that nothing is cut; False for a text a row.
        mask_share: share of a row's tokens that is to be predicted.
        random_share, kept_share: how often a random token or the token itself stands in the place of the mask.
        deleted_share: share of a row's tokens that is taken out before, unseen and not asked for.
        whole_word: hide words, not parts of them.
    """

    name: ClassVar[str] = "masked-lm"
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    pipeline: ClassVar[str] = "fill-mask"
    processor: ClassVar[str] = "AutoTokenizer"
    columns: ClassVar[Mapping[str, str]] = {"text": "the text; with the tokenizer's mask where it is to be filled in"}
    apart: ClassVar[tuple[str, ...]] = ("text",)

    max_length: int | None = None
    packing: bool = False
    mask_share: float = 0.15
    random_share: float = 0.1
    kept_share: float = 0.1
    deleted_share: float = 0.0
    whole_word: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        faults = corruption.share_faults(deleted_share=self.deleted_share)
        if not 0 < self.mask_share < 1:
            expected = "a share between 0 and 1"
            faults.append(message("a wrong value", where="mask_share", expected=expected, found=self.mask_share))
        if min(self.random_share, self.kept_share) < 0 or self.random_share + self.kept_share > 1:
            found = f"{self.random_share} and {self.kept_share}"
            expected = "shares >= 0 whose sum is at most 1"
            faults.append(message("wrong values", where="random_share, kept_share", expected=expected, found=found))
        if self.max_length is not None and self.max_length <= 2:
            expected = "a number of tokens > 2"
            faults.append(message("a wrong value", where="max_length", expected=expected, found=self.max_length))
        corruption.refuse(faults)

    # ------------------------------------------------------------------ the model

    @property
    def best_metric(self) -> tuple[str, bool]:
        """The perplexity."""
        return "perplexity", False

    @property
    def stratum(self) -> str | None:
        """None: there are no classes."""
        return None

    def complete(self, model: PreTrainedModel) -> Self:
        """Nothing is left open, but the model must predict in place.

        Raises:
            RequestError: an encoder-decoder.
        """
        if model.config.is_encoder_decoder:
            raise RequestError(
                message(
                    "an encoder-decoder writes texts anew instead of filling masks in",
                    where=type(model).__name__,
                    remedy="Take task='denoising'.",
                )
            )
        return self

    def config(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def head(self, model: PreTrainedModel) -> set[str]:
        """What lies outside the base model, the output matrix excepted: the transform before it and its biases.

        A checkpoint without them (a sentence encoder) has them made new, a live model does not tell: so they always
        train and are saved. The output matrix is the embedding, or as large, and stays the backbone's.
        """
        from adapters.anatomy import outside_backbone

        output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return {
            name
            for name in outside_backbone(model)
            if output is None or model.get_parameter(name) is not getattr(output, "weight", None)
        }

    def describe(self) -> str:
        """How much is hidden."""
        return f"{self.name}, {100 * self.mask_share:g} % of the {'words' if self.whole_word else 'tokens'} to predict"

    # ------------------------------------------------------------------ the rows

    def with_rows(self, rows: Dataset) -> Self:
        """Nothing is read off the rows."""
        return self

    def with_data(self, rows: Dataset) -> Self:
        """Nothing depends on them."""
        return self

    def check(self, rows: Dataset, *, labelled: bool) -> None:
        """Look at every raw row before anything is loaded.

        Raises:
            DataError: no column "text", a row that is not text, or an empty one.
        """
        need_column(rows, "text")
        texts_in(rows["text"], "text")

    def divides(self, rows: Dataset) -> bool:
        """Each raw row is one prepared row, but in blocks."""
        return not self.packing and "input_ids" not in rows.column_names

    def prepare(
        self, rows: Dataset, processor: Any, model: PreTrainedModel, *, labelled: bool
    ) -> tuple[Dataset, list[str]]:
        """Token ids, row by row or in blocks.

        Returns:
            A data set with input_ids, labels (the ids that may be hidden and asked for, else -100), words (with
            whole_word), length and row; rows to be answered have no labels. And remarks to be said once.

        Raises:
            DataError: a row that is not text, rows without a token to predict, an unlabelled row without a mask.
            RequestError: a tokenizer without a mask, or, with whole_word, one that does not tell words.
        """
        from adapters import tokens

        cloze.need_mask(processor)
        if "input_ids" in rows.column_names:
            prepared = tokens.taken(rows, model, labelled=False, keep=("words",))
            if labelled:
                return self._labelled(prepared, processor), []
            return prepared, []
        self.check(rows, labelled=labelled)
        texts = list(rows["text"])
        if labelled and self.packing:
            return self._labelled(tokens.numbered(self._blocks(texts, processor, model)), processor), []
        columns, cut = tokens.encode(texts, None, processor, model, max_length=self.max_length)
        limit = tokens.limit_of(self.max_length, processor, model)
        remarks = tokens.cut_remark(cut, len(rows), limit)
        if not labelled:
            self._need_masks(columns["input_ids"], processor, limit)
            return tokens.numbered(columns), remarks
        if self.whole_word:
            columns["words"] = self._words(texts, processor, max_length=limit, truncation=True)
        prepared = self._labelled(tokens.numbered(columns), processor)
        empty = sum(all(label == IGNORED for label in labels) for labels in prepared["labels"])
        if empty:
            remarks.append(f"{empty} of {len(rows)} texts hold no token to predict (only special or unknown ones)")
        return prepared, remarks

    def _blocks(self, texts: Sequence[str], processor: Any, model: PreTrainedModel) -> dict[str, list[Any]]:
        """The texts in blocks, each in the frame of special tokens, the frame's end between two texts."""
        from adapters import frames, tokens

        frame = frames.frame_of(processor)
        separator = frame.gaps[1][:1]
        size = frames.block_size(tokens.limit_of(self.max_length, processor, model), frame)
        documents = frames.bare(texts, processor, model)
        cut = [frame.around(block) for block in frames.blocks(documents, separator, size)]
        columns: dict[str, list[Any]] = {name: [row[name] for row in cut] for name in cut[0]}
        if self.whole_word:
            words, start = [], 0
            for own in self._words(texts, processor, add_special_tokens=False, verbose=False):
                words.append([start + word for word in own])
                start += max(own) + 1
            ends = [SPECIAL] * len(separator)
            before, after = ([SPECIAL] * len(gap) for gap in frame.gaps)
            columns["words"] = [[*before, *block, *after] for block in frames.blocks(words, ends, size)]
        return columns

    @staticmethod
    def _words(texts: Sequence[str], processor: Any, **options: Any) -> list[list[int]]:
        """The number of each token's word in its text; -1 for special tokens."""
        if not processor.is_fast:
            raise RequestError(
                message(
                    "the tokenizer does not tell which tokens are one word",
                    where=f"whole_word, {type(processor).__name__}",
                    expected="a fast tokenizer",
                    remedy="Leave whole_word out.",
                )
            )
        encoded = processor(list(texts), **options)
        return [[SPECIAL if word is None else word for word in encoded.word_ids(index)] for index in range(len(texts))]

    @staticmethod
    def _labelled(rows: Dataset, processor: Any) -> Dataset:
        """The rows with "labels": the ids of the tokens that may be hidden, -100 for special and unknown ones."""
        special = set(processor.all_special_ids)
        ids = rows["input_ids"]
        if "labels" in rows.column_names:
            for number, (row, labels) in enumerate(zip(ids, rows["labels"], strict=True)):
                if len(row) != len(labels) or any(b not in (a, IGNORED) for a, b in zip(row, labels, strict=True)):
                    raise DataError(
                        message(
                            "labels that are not the row's own tokens",
                            where=f"row {number}, column 'labels'",
                            expected="each token's id, or -100 for one that is never hidden",
                            remedy="Leave the column out: what is hidden is drawn in every epoch.",
                        )
                    )
            return rows
        labels = [[IGNORED if token in special else token for token in row] for row in ids]
        if all(label == IGNORED for row in labels for label in row):
            raise DataError(
                message("no row holds a token to predict", where="data", found="only special or unknown tokens")
            )
        return rows.add_column("labels", labels)

    @staticmethod
    def _need_masks(ids: Sequence[Sequence[int]], processor: Any, limit: int) -> None:
        for number, row in enumerate(ids):
            if processor.mask_token_id not in row:
                raise DataError(
                    message(
                        "no mask to fill in",
                        where=f"row {number}, column 'text'",
                        expected=f"{processor.mask_token} within the first {limit} tokens",
                    )
                )

    # ------------------------------------------------------------------ batches, losses, answers

    def collate(
        self, features: Sequence[Mapping[str, Any]], model: PreTrainedModel, processor: Any, draw: Draw | None = None
    ) -> dict[str, Any]:
        """Right-padded batch, shape (rows, longest): ids with tokens hidden; labels are the hidden ones, else -100."""
        from adapters.tokens import padded, vocabulary_of

        if "labels" in features[0]:
            ordinary = corruption.ordinary_ids(processor, vocabulary_of(model))
            features = [self._hidden(feature, processor, ordinary, draw) for feature in features]
        return padded(features, model, ("token_type_ids", "labels"))

    def _hidden(
        self, feature: Mapping[str, Any], processor: Any, ordinary: np.ndarray[Any, Any], draw: Draw | None
    ) -> dict[str, Any]:
        """A prepared row with some of its tokens hidden; without a draw always the same ones."""
        generator = (draw or Draw(corruption.FIXED)).generator(feature["row"])
        row = {
            name: feature[name]
            for name in ("input_ids", "attention_mask", "token_type_ids", "words", "labels")
            if name in feature
        }
        places = [place for place, label in enumerate(row["labels"]) if label != IGNORED]
        if self.deleted_share and len(places) > 1:
            count = min(round(self.deleted_share * len(places)), len(places) - 1)
            gone = {places[index] for index in corruption.chosen(places, count, generator)}
            row = {name: [v for place, v in enumerate(values) if place not in gone] for name, values in row.items()}
            places = [place for place, label in enumerate(row["labels"]) if label != IGNORED]
        count = corruption.count_of(self.mask_share, len(places))
        if "words" in row:
            picks = corruption.chosen_words([row["words"][place] for place in places], count, generator)
        else:
            picks = corruption.chosen(places, count, generator)
        asked = [places[index] for index in picks]
        ids, labels = list(row["input_ids"]), [IGNORED] * len(row["labels"])
        seen = corruption.replaced(
            [ids[place] for place in asked],
            processor.mask_token_id,
            ordinary,
            generator,
            random_share=self.random_share,
            kept_share=self.kept_share,
        )
        for place, token in zip(asked, seen, strict=True):
            ids[place], labels[place] = token, ids[place]
        row.pop("words", None)
        return {**row, "input_ids": ids, "labels": labels, "row": feature["row"]}

    def items(self, labels: Tensor) -> int:
        """The hidden tokens."""
        return likelihood.items(labels)

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Cross-entropy over the hidden tokens; see `likelihood.loss`."""
        return likelihood.loss(outputs.logits, labels, num_items_in_batch)

    def measured(
        self, outputs: Any, batch: Mapping[str, Any], model: PreTrainedModel, processor: Any
    ) -> tuple[Tensor, ...]:
        """Loss, right answers and hidden tokens of each row; see `likelihood.measured`."""
        return likelihood.measured(outputs.logits, batch["labels"])

    def metrics(self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, processor: Any) -> dict[str, float]:
        """Loss, perplexity and accuracy over the hidden tokens."""
        return likelihood.numbers(found)

    def findings(
        self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, raw: Dataset | None, processor: Any
    ) -> dict[str, Any]:
        """How the loss is spread over the rows, and the rows that surprised the model most."""
        from adapters import findings

        def shown(row: int) -> dict[str, Any]:
            ids = [token for token in rows[row]["input_ids"] if token not in processor.all_special_ids]
            return {"row": int(rows[row]["row"]), "text": findings.cut(processor.decode(ids))}

        return findings.likely(found, shown)

    def asked(
        self, raw: Dataset, processor: Any, model: PreTrainedModel
    ) -> tuple[Task, list[dict[str, Any]], list[tuple[str, str]]]:
        """The first rows, a word in their middle hidden."""
        rows, told = [], []
        for text in raw["text"][:SAMPLES]:
            words = text.split()[:SHOWN_WORDS]
            place = len(words) // 2
            hidden = " ".join([*words[:place], processor.mask_token, *words[place + 1 :]])
            rows.append({"text": hidden})
            told.append((hidden, words[place] if words else ""))
        return self, rows, told

    def answered(self, model: PreTrainedModel, batch: Mapping[str, Any], processor: Any) -> tuple[Tensor, ...]:
        """Scores and ids of the best tokens for each mask, each of shape (rows, most masks, 5), padded with -100."""
        import torch

        logits = model(**batch).logits
        masks = batch["input_ids"] == processor.mask_token_id
        scores, ids = logits[masks].float().softmax(-1).topk(min(TOP, logits.shape[-1]))
        counts = masks.sum(-1).tolist()
        pad = torch.nn.utils.rnn.pad_sequence
        return (
            pad(list(scores.split(counts)), batch_first=True, padding_value=-100.0),
            pad(list(ids.split(counts)), batch_first=True, padding_value=-100),
        )

    def decode(self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, processor: Any) -> list[Any]:
        """The five best fillings of a row's mask, each with score, token, token_str and sequence; of several masks a
        list of five for each, the others left as they are."""
        answers: list[Any] = []
        for scores, tokens, ids in zip(*found, rows["input_ids"], strict=True):
            places = [place for place, token in enumerate(ids) if token == processor.mask_token_id]
            single = len(places) == 1
            masks = [
                [
                    self._filling(
                        float(score), int(token), [*ids[:place], int(token), *ids[place + 1 :]], processor, single
                    )
                    for score, token in zip(scores[number], tokens[number], strict=True)
                ]
                for number, place in enumerate(places)
            ]
            answers.append(masks[0] if single else masks)
        return answers

    @staticmethod
    def _filling(score: float, token: int, ids: Sequence[int], processor: Any, single: bool) -> dict[str, Any]:
        kept = [entry for entry in ids if entry != processor.pad_token_id]
        return {
            "score": score,
            "token": token,
            "token_str": processor.decode([token]),
            "sequence": processor.decode(kept, skip_special_tokens=single),
        }

    def baseline(self, train: Dataset, test: Dataset, processor: Any) -> dict[str, float]:
        """The metrics of predicting each token by how often it occurs in the training rows."""
        ordinary = corruption.ordinary_ids(processor, len(processor))
        asked = [self._hidden(row, processor, ordinary, None)["labels"] for row in test]
        return likelihood.unigram(train["labels"], asked, len(processor))
