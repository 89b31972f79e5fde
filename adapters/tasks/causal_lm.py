"""Causal language modelling: the next token of plain texts, of completions to prompts, or of an assistant's turns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from adapters import chats, progress
from adapters.data import need_column, texts_in
from adapters.errors import DataError, RequestError, message
from adapters.options import check_types

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.contracts import Draw, Task

SAMPLES, SAMPLE_TOKENS, SHOWN_WORDS = 3, 48, 80  # rows that a report goes on with, by so many tokens, of texts so long
FORMS = {"text": ("text",), "prompt": ("prompt", "completion"), "messages": ("messages",)}


@final
@dataclass(frozen=True)
class CausalLM:
    """Texts go on: a decoder foretells each token from those before it.

    Attributes:
        max_length: tokens that a row is cut to, and those of a block; None for as many as tokenizer and model take,
            in blocks at most 1024.
        packing: rows stand in blocks of max_length tokens, none of which sees another row's. None packs plain texts
            where the model keeps them apart, and leaves prompts and conversations a row each, so that a step reads
            as many of them as the batch size says; True packs both, or refuses the model; False packs none.
        chat_template: "chatml" for a tokenizer that has no template of its own; saved with it.
        max_new_tokens: of an answer; None takes the model's generation config, else 256 but half of its length.
        do_sample: draw the answer at random instead of taking the likeliest token.
        return_full_text: answers begin with the prompt, as the pipeline's do.
    """

    name: ClassVar[str] = "causal-lm"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    pipeline: ClassVar[str] = "text-generation"
    processor: ClassVar[str] = "AutoTokenizer"
    columns: ClassVar[Mapping[str, str]] = {
        "text": "a plain text; to predict, one that is to go on",
        "prompt": "what is given",
        "completion": "what is to follow; the only part that is learnt",
        "messages": "a conversation: a list of {role, content}; what the assistant says is learnt",
    }
    apart: ClassVar[tuple[str, ...]] = ("text", "prompt")

    max_length: int | None = None
    packing: bool | None = None
    chat_template: str | None = None
    max_new_tokens: int | None = None
    do_sample: bool = False
    return_full_text: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        faults = []
        for option, least in (("max_length", 2), ("max_new_tokens", 1)):
            value = getattr(self, option)
            if value is not None and value < least:
                expected = f"a number of tokens >= {least}"
                faults.append(message("a wrong value", where=option, expected=expected, found=value))
        if self.chat_template is not None and self.chat_template not in chats.TEMPLATES:
            known = ", ".join(map(repr, chats.TEMPLATES))
            found = repr(self.chat_template)[:80]
            faults.append(message("an unknown template", where="chat_template", expected=known, found=found))
        if faults:
            raise RequestError(*faults)

    # ------------------------------------------------------------------ the model

    @property
    def best_metric(self) -> tuple[str, bool]:
        """Perplexity, the lower the better."""
        return "perplexity", False

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
        """What is foretold."""
        return f"{self.name}, the next token"

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
            DataError: no form, several forms, a row that is not text or no conversation.
        """
        form = form_of(rows, labelled=labelled)
        if form == "messages":
            chats.check(rows, labelled=labelled)
            return
        for column in FORMS[form] if labelled else FORMS[form][:1]:
            texts_in(rows[column], column)

    def divides(self, rows: Dataset) -> bool:
        """Each text is one prepared row, but in blocks; of answers some are left out, which are named by all rows."""
        return self.packing is False and "text" in rows.column_names and form_of(rows, labelled=True) == "text"

    def prepare(
        self, rows: Dataset, processor: Any, model: PreTrainedModel, *, labelled: bool
    ) -> tuple[Dataset, list[str]]:
        """Token ids and labels, -100 where nothing is learnt; without labels, prompts that leave room for an answer.

        Returns:
            A data set with input_ids, labels (the ids in their own places), position_ids for packed blocks, bytes of
            the learnt text where it is plain, asked (the prompt as JSON) where there are no labels; and remarks.

        Raises:
            DataError: a row that cannot be, or of which nothing is left to learn.
            RequestError: no chat template where one is needed; a model that cannot do what is asked.
        """
        from adapters import completions, documents, tokens

        raw = "input_ids" not in rows.column_names
        if labelled:
            documents.refuse_foresight(model)
            if "position_ids" in rows.column_names or (raw and self.packing):
                documents.need_confined(model)
        if not raw:
            return tokens.taken(rows, model, labelled=labelled, keep=("position_ids", "bytes", "asked")), []
        tokens.need_tokenizer(processor)
        self.check(rows, labelled=labelled)
        form = form_of(rows, labelled=labelled)
        if form == "messages":
            chats.need_template(processor, self.chat_template)
        limit = tokens.limit_of(self.max_length, processor, model)
        if not labelled:
            prepared, remarks = self._prompts(rows, form, processor, model, limit)
        elif form == "text":
            packs = documents.confined(model) if self.packing is None else self.packing
            prepared, remarks = self._texts(list(rows["text"]), processor, model, limit, packs=packs)
            if not packs and self.packing is None:
                remarks.append(f"one row a text: {type(model).__name__} would let the texts of a block meet")
        else:
            make = completions.of_conversations if form == "messages" else completions.of_prompts
            prepared, remarks = completions.cut(make(rows, processor, model), limit)
            remarks += completions.endless(prepared, processor, model)
            if self.packing:
                prepared, said = completions.packed(prepared, self._block(limit))
                remarks.append(said)
        return tokens.numbered({name: [row[name] for row in prepared] for name in prepared[0]}), remarks

    def _block(self, limit: int) -> int:
        """Tokens of a block, where a row may have `limit`."""
        from adapters import documents

        return limit if self.max_length else min(limit, documents.BLOCK)

    def _texts(
        self, texts: list[str], processor: Any, model: PreTrainedModel, limit: int, *, packs: bool
    ) -> tuple[list[dict[str, Any]], list[str]]:
        from adapters import documents, tokens

        found = documents.read(texts, processor, model)
        if packs:
            rows = documents.blocks(found, self._block(limit))
            if not rows:
                raise DataError(message("no text has two tokens", where="column 'text'", found=f"{len(texts)} rows"))
            return rows, []
        rows, cut = [], 0
        for number, document in enumerate(found):
            if len(document.ids) < 2:
                raise DataError(
                    message("a text of a single token: nothing to foretell", where=f"row {number}, column 'text'")
                )
            cut += len(document.ids) > limit
            rows.append(documents.row_of(document, limit))
        return rows, tokens.cut_remark(cut, len(texts), limit)

    def _prompts(
        self, rows: Dataset, form: str, processor: Any, model: PreTrainedModel, limit: int
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Prompts cut in front where they leave no room for an answer."""
        from adapters import generation, tokens

        room = limit - generation.budget(self.max_new_tokens, model, limit)
        vocabulary, ends = tokens.vocabulary_of(model), generation.ends_of(processor, model)
        prepared, cut = [], 0
        for number, given in enumerate(rows[form]):
            if form == "messages":
                ids = chats.asked(given, processor, number)
            else:
                ids = generation.without_end(processor(given, truncation=False, verbose=False)["input_ids"], ends)
            tokens.check_ids(ids, number, str(given), vocabulary)
            if len(ids) > room:
                cut += 1
                first = ids[:1] if ids[0] == processor.bos_token_id and room > 1 else []
                ids = first + ids[len(ids) - room + len(first) :]
            prepared.append({"input_ids": ids, "asked": json.dumps(given, ensure_ascii=False)})
            progress.count()
        remark = f"{cut} of {len(rows)} prompts leave no room for an answer: their last {room} tokens are taken"
        return prepared, [remark] if cut else []

    # ------------------------------------------------------------------ batches, losses, answers

    def collate(
        self, features: Sequence[Mapping[str, Any]], model: PreTrainedModel, processor: Any, draw: Draw | None = None
    ) -> dict[str, Any]:
        """Labelled rows padded on the right, prompts on the left: input_ids and attention_mask, (rows, longest).

        Packed blocks have position_ids instead of a mask: what fills a row up is one more document that nobody sees.
        """
        from adapters import tokens

        if "labels" not in features[0]:
            return tokens.padded(features, model, (), side="left")
        batch = tokens.padded(features, model, ("labels",))
        batch["use_cache"] = False
        if "position_ids" in features[0]:
            longest = batch["input_ids"].shape[1]
            places = [[*row["position_ids"], *range(longest - len(row["position_ids"]))] for row in features]
            batch["position_ids"] = tokens.stacked(places, 0)
            del batch["attention_mask"]
        return batch

    def items(self, labels: Tensor) -> int:
        """Every learnt token; nothing foretells a row's first."""
        from adapters import likelihood

        return likelihood.items(labels[:, 1:])

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Cross-entropy of each learnt token given those before it."""
        from adapters import likelihood

        return likelihood.loss(outputs.logits[:, :-1], labels[:, 1:], num_items_in_batch)

    def measured(
        self, outputs: Any, batch: Mapping[str, Any], model: PreTrainedModel, processor: Any
    ) -> tuple[Tensor, ...]:
        """Per row: nats, hits, learnt tokens."""
        from adapters import likelihood

        return likelihood.measured(outputs.logits[:, :-1], batch["labels"][:, 1:])

    def metrics(self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, processor: Any) -> dict[str, float]:
        """Loss, perplexity, token accuracy; bits per byte where the texts are plain."""
        from adapters import likelihood

        return likelihood.numbers(found, _bytes(rows))

    def findings(
        self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, raw: Dataset | None, processor: Any
    ) -> dict[str, Any]:
        """How the loss is spread over the rows, and the rows that surprised the model most."""
        from adapters import findings

        def shown(row: int) -> dict[str, Any]:
            return {"row": int(rows[row]["row"]), "text": findings.cut(processor.decode(rows[row]["input_ids"]))}

        return findings.likely(found, shown)

    def asked(
        self, raw: Dataset, processor: Any, model: PreTrainedModel
    ) -> tuple[Task, list[dict[str, Any]], list[tuple[str, str]]]:
        """The first rows: plain texts by their first half, prompts and conversations up to the last answer."""
        form = form_of(raw, labelled=True)
        rows: list[dict[str, Any]] = []
        told: list[tuple[str, str]] = []
        for row in raw.select(range(min(SAMPLES, len(raw)))):
            if form == "messages":
                turns = list(row["messages"])
                last = max((n for n, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
                rows.append({"messages": turns[:last]})
                given = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns[:last])
                told.append((given, str(turns[last]["content"]) if last < len(turns) else ""))
            elif form == "prompt":
                rows.append({"prompt": row["prompt"]})
                told.append((row["prompt"], row["completion"]))
            else:
                words = row["text"].split(" ")[:SHOWN_WORDS]
                half = max(1, len(words) // 2)
                rows.append({"text": " ".join(words[:half])})
                told.append((" ".join(words[:half]), " ".join(words[half:])))
        return replace(self, max_new_tokens=SAMPLE_TOKENS, return_full_text=False, do_sample=False), rows, told

    def answered(self, model: PreTrainedModel, batch: Mapping[str, Any], processor: Any) -> tuple[Tensor, ...]:
        """The ids that the model goes on with, shape (rows, new tokens)."""
        from adapters import generation, tokens

        limit = tokens.limit_of(self.max_length, processor, model)
        return (
            generation.generated(
                model,
                {name: batch[name] for name in ("input_ids", "attention_mask")},
                generation.ends_of(processor, model),
                max_new_tokens=generation.budget(self.max_new_tokens, model, limit),
                do_sample=self.do_sample,
            ),
        )

    def decode(
        self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, processor: Any
    ) -> list[dict[str, Any] | list[dict[str, Any]]]:
        """generated_text a row: the prompt and what follows, or the conversation with the answer in it."""
        from adapters import generation

        answers: list[dict[str, Any] | list[dict[str, Any]]] = []
        told = [json.loads(text) for text in rows["asked"]] if "asked" in rows.column_names else [""] * len(rows)
        for given, text in zip(told, generation.texts(found[0], processor), strict=True):
            whole = given + text if isinstance(given, str) else chats.answered(given, text)
            answers.append({"generated_text": whole if self.return_full_text else text})
        return answers

    def baseline(self, train: Dataset, test: Dataset, processor: Any) -> dict[str, float]:
        """The metrics of the training tokens' unigram distribution."""
        from adapters import likelihood

        seen = (labels[1:] for labels in train["labels"])
        truth = [labels[1:] for labels in test["labels"]]
        most = max(max(map(max, train["labels"])), max(map(max, test["labels"])))
        return likelihood.unigram(seen, truth, max(len(processor or ()), most + 1), _bytes(test))


def form_of(rows: Dataset, *, labelled: bool) -> str:
    """The one form of rows, by their columns: "text", "prompt" (and completion) or "messages".

    Raises:
        DataError: none, or several.
    """
    forms = [form for form, columns in FORMS.items() if columns[0] in rows.column_names]
    if len(forms) != 1:
        raise DataError(
            message(
                "rows of several forms" if forms else "rows of no known form",
                where="data",
                expected="text, or prompt and completion, or messages",
                found=", ".join(rows.column_names),
                remedy="Leave one of them." if forms else "Name the column: columns={'text': ...}.",
            )
        )
    if labelled:
        for column in FORMS[forms[0]]:
            need_column(rows, column)
    return forms[0]


def _bytes(rows: Dataset) -> list[int] | None:
    return list(rows["bytes"]) if "bytes" in rows.column_names else None
