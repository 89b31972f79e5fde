"""Denoising: texts with spans hidden, to the spans (T5) or to the whole texts (BART); for encoder-decoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from adapters import corruption, likelihood
from adapters.contracts import Draw, Task
from adapters.data import need_column, texts_in
from adapters.errors import DataError, RequestError, message, nearest
from adapters.likelihood import IGNORED
from adapters.options import check_types

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

SAMPLES, SHOWN_WORDS, SAMPLE_TOKENS = 3, 24, 24  # rows of which a report fills a gap, how much of them and by what
LONGEST = 512  # tokens of an answer, where neither tokenizer nor model names a length
SHARES = {"spans": 0.15, "infilling": 0.3}  # of the tokens, as in the papers


def sentinels_of(processor: Any, vocabulary: int) -> list[int]:
    """The ids of T5's marks for hidden spans, <extra_id_0> first; none for other tokenizers."""
    known = processor.get_vocab()
    found: list[int] = []
    while (token := known.get(f"<extra_id_{len(found)}>")) is not None and token < vocabulary:
        found.append(token)
    return found


@final
@dataclass(frozen=True)
class Denoising:
    """Texts with hidden spans, to what was hidden.

    Attributes:
        max_length: tokens that a row is cut to; None for as many as tokenizer and model take.
        packing: texts one after the other in blocks of max_length, so that nothing is cut; False for a text a row.
        objective: "spans": the hidden spans are written, each after its mark (Raffel et al., 2020); "infilling": the
            whole text is, and each span stood behind one mask (Lewis et al., 2020). None for the one that the
            tokenizer has the tokens for.
        hidden_share: share of a row's tokens that is hidden; None for the paper's: 0.15 of spans, 0.3 of infilling.
        mean_span: tokens of a hidden span, on average.
        max_new_tokens: tokens of an answer at most; None for as many as a row may have, and 512 at most.
    """

    name: ClassVar[str] = "denoising"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    pipeline: ClassVar[str] = "text2text-generation"
    processor: ClassVar[str] = "AutoTokenizer"
    columns: ClassVar[Mapping[str, str]] = {"text": "the text; to be answered, with the tokenizer's marks for gaps"}
    apart: ClassVar[tuple[str, ...]] = ("text",)

    max_length: int | None = None
    packing: bool = False
    objective: str | None = None
    hidden_share: float | None = None
    mean_span: float = 3.0
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        faults = []
        if self.objective is not None and self.objective not in SHARES:
            remedy = nearest(self.objective, SHARES)
            faults.append(message(f"unknown objective {self.objective!r}", where="objective", remedy=remedy))
        for option, fine, expected in (
            ("hidden_share", self.hidden_share is None or 0 < self.hidden_share < 1, "a share between 0 and 1"),
            ("mean_span", self.mean_span >= 1, "a number of tokens >= 1"),
            ("max_length", self.max_length is None or self.max_length > 4, "a number of tokens > 4"),
            ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens > 0, "a number of tokens > 0"),
        ):
            if not fine:
                faults.append(message("a wrong value", where=option, expected=expected, found=getattr(self, option)))
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
        """Nothing is left open, but the model must know how its decoder is fed.

        Raises:
            RequestError: a model that is no encoder-decoder of texts.
        """
        if getattr(model, "prepare_decoder_input_ids_from_labels", None) is None:
            raise RequestError(
                message(
                    "the model does not say how labels become its decoder's inputs",
                    where=type(model).__name__,
                    expected="an encoder-decoder such as T5 or BART",
                    remedy="For encoders take task='masked-lm'.",
                )
            )
        return self

    def config(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def head(self, model: PreTrainedModel) -> set[str]:
        """None: the output layer is the pretrained model's own."""
        return set()

    def describe(self) -> str:
        """The objective."""
        return f"{self.name}, {self.objective or 'spans or infilling, as the tokenizer has it'}"

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

    def _marks(self, processor: Any, vocabulary: int) -> tuple[str, list[int]]:
        """The objective and the ids of its marks: a sentinel a span, or the mask.

        Raises:
            RequestError: the tokenizer has none.
        """
        from adapters.tokens import need_tokenizer

        need_tokenizer(processor)
        marks = {"spans": sentinels_of(processor, vocabulary), "infilling": [processor.mask_token_id]}
        for objective in [self.objective] if self.objective else SHARES:
            if marks[objective] not in ([], [None]):
                return objective, marks[objective]
        raise RequestError(
            message(
                "the tokenizer has no mark for what is hidden",
                where=type(processor).__name__,
                expected={"spans": "<extra_id_0>, <extra_id_1> ...", "infilling": "a mask token"}.get(
                    self.objective or "", "<extra_id_0>, <extra_id_1> ... or a mask token"
                ),
                remedy="Take another objective or backbone.",
            )
        )

    def prepare(
        self, rows: Dataset, processor: Any, model: PreTrainedModel, *, labelled: bool
    ) -> tuple[Dataset, list[str]]:
        """Token ids, row by row or in blocks.

        Returns:
            A data set with tokens (ids without special tokens, from which the hidden ones are drawn), length and
            row; rows to be answered have input_ids instead. And remarks to be said once.

        Raises:
            DataError: a row that is not text, or has nothing that can be hidden or filled in.
            RequestError: a tokenizer without marks for what is hidden.
        """
        from datasets import Dataset

        from adapters import frames, tokens

        if "tokens" in rows.column_names and "length" in rows.column_names:
            return rows, []
        if "input_ids" in rows.column_names:
            return tokens.taken(rows, model, labelled=labelled), []
        _, marks = self._marks(processor, tokens.vocabulary_of(model))
        self.check(rows, labelled=labelled)
        texts = list(rows["text"])
        limit = tokens.limit_of(self.max_length, processor, model)
        if not labelled:
            columns, cut = tokens.encode(texts, None, processor, model, max_length=self.max_length)
            self._need_gaps(columns["input_ids"], marks, processor, limit)
            return tokens.numbered(columns), tokens.cut_remark(cut, len(rows), limit)
        frame = frames.frame_of(processor)
        room = limit - frame.size
        documents = frames.bare(texts, processor, model)
        if self.packing:
            kept = list(frames.blocks(documents, frame.gaps[1][:1], frames.block_size(limit, frame)))
            remarks = []
        else:
            kept = [document[:room] for document in documents]
            remarks = tokens.cut_remark(sum(len(document) > room for document in documents), len(rows), limit)
        short = sum(len(row) < 2 for row in kept)
        if short == len(kept):
            raise DataError(message("no row has two tokens", where="column 'text'", expected="longer texts"))
        if short and not self.packing:
            remarks.append(f"{short} of {len(rows)} texts have one token: nothing beside it can be hidden; left out")
        kept = [row for row in kept if len(row) > 1]
        lengths = [len(row) + frame.size for row in kept]
        return Dataset.from_dict({"tokens": kept, "length": lengths, "row": list(range(len(kept)))}), remarks

    @staticmethod
    def _need_gaps(ids: Sequence[Sequence[int]], marks: Sequence[int], processor: Any, limit: int) -> None:
        for number, row in enumerate(ids):
            if marks[0] not in row:
                raise DataError(
                    message(
                        "no gap to fill in",
                        where=f"row {number}, column 'text'",
                        expected=f"{processor.convert_ids_to_tokens(marks[0])} within the first {limit} tokens",
                    )
                )

    # ------------------------------------------------------------------ batches, losses, answers

    def collate(
        self, features: Sequence[Mapping[str, Any]], model: PreTrainedModel, processor: Any, draw: Draw | None = None
    ) -> dict[str, Any]:
        """Right-padded batch: input_ids (rows, longest), labels and decoder_input_ids (rows, longest target)."""
        from adapters.tokens import padded, vocabulary_of

        if "tokens" in features[0]:
            features = self._corrupted(features, processor, vocabulary_of(model), draw)
        batch = padded(features, model, ("labels",))
        if "labels" in batch:
            seq2seq: Any = model
            batch["decoder_input_ids"] = seq2seq.prepare_decoder_input_ids_from_labels(batch["labels"])
        return batch

    def _corrupted(
        self, features: Sequence[Mapping[str, Any]], processor: Any, vocabulary: int, draw: Draw | None
    ) -> list[dict[str, Any]]:
        """Inputs and targets of rows, drawn for this epoch; without a draw always the same."""
        from adapters import frames

        objective, marks = self._marks(processor, vocabulary)
        frame = frames.frame_of(processor)
        share = SHARES[objective] if self.hidden_share is None else self.hidden_share
        rows = []
        for feature in features:
            generator = (draw or Draw(corruption.FIXED)).generator(feature["row"])
            ids: list[int] = feature["tokens"]
            if objective == "spans":
                spans = corruption.noise_spans(len(ids), share, self.mean_span, len(marks) - 1, generator)
                target = [t for n, (start, end) in enumerate(spans) for t in (marks[n], *ids[start:end])]
                target += [marks[len(spans)], *frame.gaps[1]]
            else:
                spans = corruption.infilling_spans(len(ids), share, self.mean_span, generator)
                target = frame.around(ids)["input_ids"]
            seen, place = [], 0
            for number, (start, end) in enumerate(spans):
                seen += [*ids[place:start], marks[number] if objective == "spans" else marks[0]]
                place = end
            seen += ids[place:]
            rows.append({"input_ids": frame.around(seen)["input_ids"], "labels": target, "row": feature["row"]})
        return rows

    def items(self, labels: Tensor) -> int:
        """The target's tokens, marks and end included."""
        return likelihood.items(labels)

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Cross-entropy over the target's tokens; see `likelihood.loss`."""
        return likelihood.loss(outputs.logits, labels, num_items_in_batch)

    def measured(
        self, outputs: Any, batch: Mapping[str, Any], model: PreTrainedModel, processor: Any
    ) -> tuple[Tensor, ...]:
        """Loss, right answers and tokens of each row; see `likelihood.measured`."""
        return likelihood.measured(outputs.logits, batch["labels"])

    def metrics(self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, processor: Any) -> dict[str, float]:
        """Loss, perplexity and accuracy over the target's tokens, each predicted from the right ones before it."""
        return likelihood.numbers(found)

    def findings(
        self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, raw: Dataset | None, processor: Any
    ) -> dict[str, Any]:
        """How the loss is spread over the rows, and the rows that surprised the model most."""
        from adapters import findings

        name = "tokens" if "tokens" in rows.column_names else "input_ids"

        def shown(row: int) -> dict[str, Any]:
            text = processor.decode(rows[row][name], skip_special_tokens=True)
            return {"row": int(rows[row]["row"]), "text": findings.cut(text)}

        return findings.likely(found, shown)

    def asked(
        self, raw: Dataset, processor: Any, model: PreTrainedModel
    ) -> tuple[Task, list[dict[str, Any]], list[tuple[str, str]]]:
        """The first rows, two words in their middle hidden."""
        from adapters.tokens import vocabulary_of

        _, marks = self._marks(processor, vocabulary_of(model))
        mark = processor.convert_ids_to_tokens(marks[0])
        rows, told = [], []
        for text in raw["text"][:SAMPLES]:
            words = text.split()[:SHOWN_WORDS]
            place = max(1, len(words) // 2)
            hidden = " ".join([*words[:place], mark, *words[place + 2 :]])
            rows.append({"text": hidden})
            told.append((hidden, " ".join(words[place : place + 2])))
        return replace(self, max_new_tokens=SAMPLE_TOKENS), rows, told

    def answered(self, model: PreTrainedModel, batch: Mapping[str, Any], processor: Any) -> tuple[Tensor, ...]:
        """The ids that the decoder writes, greedily, shape (rows, longest)."""
        from adapters.tokens import limit_of

        writer: Any = model
        limit = self.max_new_tokens or min(LONGEST, limit_of(self.max_length, processor, model))
        kept = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return (writer.generate(**kept, max_new_tokens=limit, do_sample=False, num_beams=1)[:, 1:],)

    def decode(
        self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, processor: Any
    ) -> list[dict[str, Any] | list[dict[str, Any]]]:
        """generated_text: the text with its gaps filled."""
        objective, marks = self._marks(processor, len(processor))
        answers: list[dict[str, Any] | list[dict[str, Any]]] = []
        for written, given in zip(found[0].tolist(), rows["input_ids"], strict=True):
            ids = [token for token in written if token not in (IGNORED, processor.pad_token_id)]
            if objective == "spans":
                ids = _filled(given, ids, marks, processor.eos_token_id)
            answers.append({"generated_text": processor.decode(ids, skip_special_tokens=True)})
        return answers

    def baseline(self, train: Dataset, test: Dataset, processor: Any) -> dict[str, float]:
        """The metrics of predicting each token by how often it occurs in the training rows' targets."""
        parts = []
        for rows in (train, test):
            features = list(rows)
            drawn = self._corrupted(features, processor, len(processor), None) if "tokens" in features[0] else features
            parts.append([row["labels"] for row in drawn])
        return likelihood.unigram(parts[0], parts[1], len(processor))


def _filled(given: Sequence[int], written: Sequence[int], marks: Sequence[int], end: int) -> list[int]:
    """A row's ids with each mark replaced by what was written after it; a mark that was not answered goes."""
    fillings: dict[int, list[int]] = {}
    current: list[int] = []
    for token in written:
        if token == end:
            break
        if token in marks:
            current = fillings.setdefault(token, [])
        else:
            current.append(token)
    return [t for token in given for t in (fillings.get(token, []) if token in marks else [token])]
