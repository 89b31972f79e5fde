"""Words to tokens and back: which token belongs to which word, and to which characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapters import progress, tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLE = "we met a friend there, at 7"  # a text whose words every tokenizer knows how to part


def encode(
    cells: Sequence[str] | Sequence[Sequence[str]],
    processor: Any,
    model: PreTrainedModel,
    *,
    max_length: int | None = None,
) -> tuple[dict[str, list[Any]], list[str]]:
    """Texts, or lists of words, to model inputs that know where each token stands.

    Args:
        cells: all texts, or all lists of words.
        processor, model: a fast tokenizer and the model that reads its ids.
        max_length: tokens that a row is cut to; None for as many as tokenizer and model take.

    Returns:
        The tokenizer's columns; words (the word of each token), begins and ends (its characters in `text`), -1 for
        special tokens; text (words joined by spaces); count (words, -1 for a text). And remarks on what was lost.

    Raises:
        DataError: a row without tokens, or with ids that the model does not have.
    """
    import numpy as np

    limit, vocabulary = tokens.limit_of(max_length, processor, model), tokens.vocabulary_of(model)
    split = not isinstance(cells[0], str)
    lead = _lead(processor) if split else ""
    columns: dict[str, list[Any]] = {}
    cut_rows, cut_words, silent = 0, 0, list[int]()
    for start in progress.chunks(len(cells), tokens.CHUNK):
        part = [_led(cell, lead) for cell in cells[start : start + tokens.CHUNK]]
        options: dict[str, Any] = {"is_split_into_words": split, "return_offsets_mapping": True, "verbose": False}
        found = processor(part, truncation=True, max_length=limit, return_special_tokens_mask=True, **options)
        full = [index for index, row in enumerate(found["input_ids"]) if len(row) >= limit]
        whole = processor([part[index] for index in full], truncation=False, **options) if full else None
        uncut = {index: set(whole.word_ids(place)) for place, index in enumerate(full)} if whole is not None else {}
        lengths = {index: len(whole["input_ids"][place]) for place, index in enumerate(full)} if whole else {}
        for index, given in enumerate(part):
            row, cell = start + index, cells[start + index]
            text = " ".join(cell) if split else str(cell)
            tokens.check_ids(found["input_ids"][index], row, text, vocabulary)
            special = np.asarray(found["special_tokens_mask"][index], dtype=bool)
            places = np.asarray([-1 if word is None else word for word in found.word_ids(index)], dtype=np.int32)
            spans = np.asarray(found["offset_mapping"][index], dtype=np.int32).reshape(-1, 2)
            if split:
                spans = _in_sentence(spans, places, cell, given)
                seen = {int(word) for word in places if word >= 0}
                there = {word for word in uncut.get(index, seen) if word is not None}
                cut_words += len(there - seen)
                silent += [row] * (len(cell) - len(there))
            places[special], spans[special] = -1, -1
            cut_rows += lengths.get(index, 0) > limit
            made = {"words": places, "begins": spans[:, 0], "ends": spans[:, 1], "text": text}
            for name, value in {**made, "count": len(cell) if split else -1}.items():
                columns.setdefault(name, []).append(value)
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            if name in found:
                columns.setdefault(name, []).extend(found[name])
    remarks = tokens.cut_remark(cut_rows, len(cells), limit)
    if cut_words:
        remarks = [f"{remarks[0]}; {cut_words} words are lost and an evaluation counts them as missed"]
    if silent:
        remarks.append(
            f"{len(silent)} words become no token, first in row {silent[0]}: an evaluation counts them as missed"
        )
    return columns, remarks


def _lead(processor: Any) -> str:
    """What goes before a word, so that words give the tokens that they have in running text.

    Byte-level tokenizers keep the space before a word in its token and do not add it to words given one by one.
    """
    text = processor(SAMPLE, add_special_tokens=False)["input_ids"]
    for lead in ("", " "):
        words = _led(SAMPLE.split(), lead)
        if processor(words, is_split_into_words=True, add_special_tokens=False)["input_ids"] == text:
            return lead
    return ""


def _led(cell: Any, lead: str) -> Any:
    return [word if place == 0 else lead + word for place, word in enumerate(cell)] if lead else cell


def _in_sentence(spans: Any, places: Any, cell: Sequence[str], given: Sequence[str]) -> Any:
    """Characters within a word as characters of the words joined by spaces."""
    import numpy as np

    lengths = np.asarray([len(word) for word in cell])
    starts = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]])
    added = np.asarray([len(long) - len(word) for long, word in zip(given, cell, strict=True)])
    inside = np.clip(spans - added[places][:, None], 0, lengths[places][:, None])
    return (inside + starts[places][:, None]).astype(np.int32)
