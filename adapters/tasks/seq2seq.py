"""Sequence to sequence: a target text for a source text, such as its translation or summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from adapters.data import need_column, texts_in
from adapters.errors import RequestError, message, nearest
from adapters.options import check_types

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.contracts import Draw, Task

# What evaluation measures on generated texts -> the metric that chooses, and what the answer is called.
SCORES = {"none": ("perplexity", "generated_text"), "translation": ("chrf", "translation_text")}
SCORES |= {"rouge": ("rougeL", "summary_text")}
SAMPLES, SAMPLE_TOKENS = 3, 64  # rows that a report shows answers to, and their tokens at most
LONGEST = 512  # tokens of a source or target at most, where neither request nor model says (T5 has no positions)


@final
@dataclass(frozen=True)
class Seq2Seq:
    """A source text to a target text, by an encoder-decoder.

    Attributes:
        prefix: put before every source, such as "translate English to German: ".
        max_length: tokens that a source is cut to; None for as many as tokenizer and model take.
        max_target_length: the same for targets.
        scores: what evaluation measures besides the loss, on texts that it generates, which takes its time:
            "translation" (BLEU and chrF), "rouge", or "none".
        max_new_tokens: of an answer; None takes the model's generation config, else 256 but half of its length.
        num_beams: of the search for an answer; None takes the model's generation config.
    """

    name: ClassVar[str] = "seq2seq"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    pipeline: ClassVar[str] = "text2text-generation"
    processor: ClassVar[str] = "AutoTokenizer"
    columns: ClassVar[Mapping[str, str]] = {"source": "the text that is given", "target": "the text that is wanted"}
    apart: ClassVar[tuple[str, ...]] = ("source",)

    prefix: str = ""
    max_length: int | None = None
    max_target_length: int | None = None
    scores: str = "none"
    max_new_tokens: int | None = None
    num_beams: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        faults = []
        for option, least in (("max_length", 2), ("max_target_length", 2), ("max_new_tokens", 1), ("num_beams", 1)):
            value = getattr(self, option)
            if value is not None and value < least:
                faults.append(message("a wrong value", where=option, expected=f"a number >= {least}", found=value))
        if self.scores not in SCORES:
            remedy = nearest(self.scores, SCORES)
            faults.append(message(f"unknown scores {self.scores!r}", where="scores", remedy=remedy))
        if faults:
            raise RequestError(*faults)

    # ------------------------------------------------------------------ the model

    @property
    def best_metric(self) -> tuple[str, bool]:
        """Perplexity; where texts are scored chrF (BLEU is 0 where few texts share no four words), or ROUGE-L."""
        return SCORES[self.scores][0], self.scores != "none"

    @property
    def stratum(self) -> str | None:
        """Texts have no classes."""
        return None

    def complete(self, model: PreTrainedModel) -> Self:
        """Nothing is left open."""
        return self

    def config(self) -> dict[str, Any]:
        """Nothing is set."""
        return {}

    def head(self, model: PreTrainedModel) -> set[str]:
        """None: the vocabulary head belongs to the pretrained model, tied to its embeddings or not."""
        return set()

    def describe(self) -> str:
        """What is made of what."""
        return f"{self.name}, source to target"

    # ------------------------------------------------------------------ the rows

    def with_rows(self, rows: Dataset) -> Self:
        """Nothing is read off the rows."""
        return self

    def with_data(self, rows: Dataset) -> Self:
        """Nothing depends on the training rows."""
        return self

    def check(self, rows: Dataset, *, labelled: bool) -> None:
        """Look at every raw row before anything is loaded.

        Raises:
            DataError: a missing column, a row that is not text.
            MissingPackageError: scores that need a package; names the extra.
        """
        from adapters import metrics

        if labelled and self.scores != "none":
            metrics.signature(self.scores)
        for column in ("source", "target") if labelled else ("source",):
            need_column(rows, column)
            texts_in(rows[column], column)

    def divides(self, rows: Dataset) -> bool:
        """Each raw row is one prepared row."""
        return "input_ids" not in rows.column_names

    def prepare(
        self, rows: Dataset, processor: Any, model: PreTrainedModel, *, labelled: bool
    ) -> tuple[Dataset, list[str]]:
        """Token ids of sources, and of targets with their end token as labels.

        Returns:
            A data set with input_ids, attention_mask, labels, and for scores the texts "given" and "wanted"; remarks.

        Raises:
            DataError: a row that cannot be.
        """
        from adapters import generation, metrics, tokens

        if "input_ids" in rows.column_names:
            return tokens.taken(rows, model, labelled=labelled, keep=("given", "wanted")), []
        tokens.need_tokenizer(processor)
        self.check(rows, labelled=labelled)
        sources = [self.prefix + text for text in rows["source"]]
        limit = self._limit(self.max_length, processor, model)
        columns, cut = tokens.encode(sources, None, processor, model, max_length=limit)
        columns = {name: columns[name] for name in ("input_ids", "attention_mask")}
        remarks = [remark.replace("texts", "sources") for remark in tokens.cut_remark(cut, len(rows), limit)]
        if labelled:
            limit = self._limit(self.max_target_length, processor, model)
            end = generation.end_of(processor, model)
            columns["labels"], cut = _targets(list(rows["target"]), processor, model, end, limit)
            remarks += [remark.replace("texts", "targets") for remark in tokens.cut_remark(cut, len(rows), limit)]
            if self.scores != "none":
                columns |= {"given": list(rows["source"]), "wanted": list(rows["target"])}
                remarks += [f"scores: {metrics.signature(self.scores)}"]
        return tokens.numbered(columns), remarks

    def _limit(self, wanted: int | None, processor: Any, model: PreTrainedModel) -> int:
        from adapters import tokens

        most = tokens.limit_of(wanted, processor, model)
        return most if wanted or most < tokens.UNBOUNDED else LONGEST

    # ------------------------------------------------------------------ batches, losses, answers

    def collate(
        self, features: Sequence[Mapping[str, Any]], model: PreTrainedModel, processor: Any, draw: Draw | None = None
    ) -> dict[str, Any]:
        """Right-padded batch: input_ids and attention_mask (rows, longest source), and for labelled rows labels and
        decoder_input_ids (rows, longest target): the labels moved one place on by the model itself.
        """
        from adapters.tokens import padded

        batch = padded(features, model, ("labels",))
        if "labels" in batch:
            shift: Any = model.prepare_decoder_input_ids_from_labels
            batch["decoder_input_ids"] = shift(batch["labels"])
            batch["use_cache"] = False
        return batch

    def items(self, labels: Tensor) -> int:
        """Every token of the targets, end tokens included."""
        from adapters import likelihood

        return likelihood.items(labels)

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Cross-entropy of each target token given the source and those before it."""
        from adapters import likelihood

        return likelihood.loss(outputs.logits, labels, num_items_in_batch)

    def measured(
        self, outputs: Any, batch: Mapping[str, Any], model: PreTrainedModel, processor: Any
    ) -> tuple[Tensor, ...]:
        """Per row: nats, hits, target tokens; where texts are scored the generated ids, shape (rows, new tokens)."""
        from adapters import likelihood

        found = likelihood.measured(outputs.logits, batch["labels"])
        return found if self.scores == "none" else (*found, *self.answered(model, batch, processor))

    def metrics(self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, processor: Any) -> dict[str, float]:
        """Loss, perplexity, token accuracy, and the scores of the generated texts."""
        from adapters import generation, likelihood

        numbers = likelihood.numbers(found)
        if self.scores == "none":
            return numbers
        return numbers | self._scored(generation.texts(found[3], processor), rows, processor)

    def _scored(self, said: list[str], rows: Dataset, processor: Any) -> dict[str, float]:
        from adapters import metrics

        if "wanted" in rows.column_names:
            wanted = list(rows["wanted"])
        else:  # prepared elsewhere: the targets as their tokens say them
            wanted = [processor.decode([t for t in row if t >= 0], skip_special_tokens=True) for row in rows["labels"]]
        return metrics.translation(said, wanted) if self.scores == "translation" else metrics.rouge(said, wanted)

    def findings(
        self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, raw: Dataset | None, processor: Any
    ) -> dict[str, Any]:
        """How the loss is spread over the rows, and the rows that surprised the model most."""
        from adapters import findings, generation

        said = generation.texts(found[3], processor) if len(found) > 3 else None

        def shown(row: int) -> dict[str, Any]:
            number = int(rows[row]["row"])
            target = [token for token in rows[row]["labels"] if token >= 0]
            source = raw[number]["source"] if raw is not None else processor.decode(rows[row]["input_ids"])
            wanted = raw[number]["target"] if raw is not None else processor.decode(target, skip_special_tokens=True)
            spoken = {"said": findings.cut(said[row])} if said is not None else {}
            return {"row": number, "text": findings.cut(source), "expected": findings.cut(wanted), **spoken}

        return findings.likely(found, shown)

    def asked(
        self, raw: Dataset, processor: Any, model: PreTrainedModel
    ) -> tuple[Task, list[dict[str, Any]], list[tuple[str, str]]]:
        """The first rows."""
        rows = [{"source": row["source"]} for row in raw.select(range(min(SAMPLES, len(raw))))]
        told = [(row["source"], row["target"]) for row in raw.select(range(len(rows)))]
        return replace(self, max_new_tokens=self.max_new_tokens or SAMPLE_TOKENS), rows, told

    def answered(self, model: PreTrainedModel, batch: Mapping[str, Any], processor: Any) -> tuple[Tensor, ...]:
        """The generated ids, shape (rows, new tokens)."""
        from adapters import generation

        limit = self._limit(None, processor, model)
        return (
            generation.generated(
                model,
                {name: batch[name] for name in ("input_ids", "attention_mask")},
                generation.ends_of(processor, model),
                max_new_tokens=generation.budget(self.max_new_tokens, model, limit),
                num_beams=self.num_beams,
                do_sample=False,
            ),
        )

    def decode(
        self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, processor: Any
    ) -> list[dict[str, Any] | list[dict[str, Any]]]:
        """generated_text a row; translation_text and summary_text by the scores, as transformers' pipelines had it."""
        from adapters import generation

        return [{SCORES[self.scores][1]: text} for text in generation.texts(found[0], processor)]

    def baseline(self, train: Dataset, test: Dataset, processor: Any) -> dict[str, float]:
        """The loss of the training targets' unigram distribution; the scores of giving the source back as it is.

        A copy holds what source and target share (names, numbers, a summary's own words): a model must beat it.
        """
        from adapters import likelihood

        most = max(max(map(max, train["labels"])), max(map(max, test["labels"])))
        numbers = likelihood.unigram(train["labels"], list(test["labels"]), max(len(processor or ()), most + 1))
        if self.scores == "none" or "given" not in test.column_names:
            return numbers
        return numbers | self._scored(list(test["given"]), test, processor)


def _targets(
    texts: list[str], processor: Any, model: PreTrainedModel, end: int | None, limit: int
) -> tuple[list[list[int]], int]:
    """Targets as the tokenizer writes them, each with its end token; and how many were cut, which have none.

    Raises:
        DataError: a row without tokens, or with ids that the model does not have.
    """
    from adapters import tokens

    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    found, cut = [], 0
    for begin in range(0, len(texts), tokens.CHUNK):
        part = texts[begin : begin + tokens.CHUNK]
        for index, ids in enumerate(processor(text_target=part, truncation=False, verbose=False)["input_ids"]):
            tokens.check_ids(ids, begin + index, part[index], vocabulary)
            whole = [*ids, end] if end is not None and ids[-1] != end else list(ids)
            cut += len(whole) > limit
            found.append(whole[:limit])
    return found, cut
