"""Texts to token ids, row by row, and padded batches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from adapters import progress
from adapters.data import need_column
from adapters.errors import DataError, RequestError, message

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

CHUNK = 1000  # rows tokenised at once
UNBOUNDED = 1 << 20  # tokens: neither tokenizer nor model names a length
FILLS = {"attention_mask": 0, "token_type_ids": 0, "labels": -100}  # padding of columns; input_ids take the model's


def need_tokenizer(processor: Any) -> None:
    """Refuse to prepare raw texts without a tokenizer.

    Raises:
        RequestError: there is none.
    """
    if processor is None:
        raise RequestError(
            message("raw rows need a tokenizer", where="processor", remedy="Pass processor=AutoTokenizer....")
        )


def need_fast(processor: Any) -> None:
    """Refuse a tokenizer that cannot say which characters a token stands for.

    Raises:
        RequestError: there is none, or it is written in Python.
    """
    need_tokenizer(processor)
    if not processor.is_fast:
        raise RequestError(
            message(
                "the tokenizer does not tell where its tokens stand in the text",
                where=type(processor).__name__,
                expected="a fast tokenizer",
                remedy="Load it by AutoTokenizer, from a folder with a tokenizer.json.",
            )
        )


def length_faults(max_length: int | None) -> list[str]:
    """What is wrong with a task's option of that name, as a list of messages."""
    if max_length is None or max_length > 2:
        return []
    return [message("a wrong value", where="max_length", expected="a number of tokens > 2", found=max_length)]


def limit_of(max_length: int | None, processor: Any, model: PreTrainedModel) -> int:
    """The number of tokens that a row may have: the option's, the tokenizer's and the model's smallest."""
    from adapters.anatomy import longest_input

    return min(max_length or UNBOUNDED, longest_input(processor, model))


def vocabulary_of(model: PreTrainedModel) -> int:
    """The number of token ids that the model has."""
    return int(model.config.get_text_config().vocab_size)


def check_ids(ids: Sequence[int], row: int, text: str, vocabulary: int) -> None:
    """Refuse a row without tokens, or with ids that the model does not have.

    Raises:
        DataError: with the row's number and text.
    """
    if not ids or max(ids) >= vocabulary:
        raise DataError(
            message(
                "token ids that the model does not have" if ids else "a row without tokens",
                where=f"row {row}: {text!r}"[:160],
                expected=f"ids below {vocabulary}",
                found=max(ids, default="none"),
                remedy="Use the tokenizer that belongs to the model." if ids else "Remove the row.",
            )
        )


def encode(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    processor: Any,
    model: PreTrainedModel,
    *,
    max_length: int | None = None,
    start: int = 0,
) -> tuple[dict[str, list[Any]], int]:
    """Texts (or pairs) to model inputs, cut to the longest row that option, tokenizer and model take.

    Args:
        texts, pairs: of the same length.
        processor, model: the tokenizer and the model that reads its ids.
        max_length: tokens that a row is cut to; None for as many as tokenizer and model take.
        start: the number of the first row, for messages.

    Returns:
        Columns of the tokenizer with one list a row; and how many rows were cut.

    Raises:
        DataError: a row without tokens, or with ids that the model does not have.
    """
    limit, vocabulary = limit_of(max_length, processor, model), vocabulary_of(model)
    columns: dict[str, list[Any]] = {}
    cut = 0
    for begin in progress.chunks(len(texts), CHUNK):
        first = list(texts[begin : begin + CHUNK])
        second = list(pairs[begin : begin + CHUNK]) if pairs is not None else None
        encoded = dict(processor(first, second, truncation=True, max_length=limit))
        ids = cast("list[list[int]]", encoded["input_ids"])
        full = [index for index, row in enumerate(ids) if len(row) >= limit]
        if full:
            whole = processor(
                [first[i] for i in full],
                [second[i] for i in full] if second else None,
                truncation=False,
                verbose=False,
            )["input_ids"]
            cut += sum(len(row) > limit for row in whole)
        for index, row in enumerate(ids):
            check_ids(row, start + begin + index, first[index], vocabulary)
        for name, values in encoded.items():
            columns.setdefault(name, []).extend(values)
    return columns, cut


def cut_remark(cut: int, total: int, limit: int) -> list[str]:
    """What is said once about texts that were cut; nothing where none was."""
    if not cut:
        return []
    return [f"{cut} of {total} texts ({100 * cut / total:.1f} %) are longer than {limit} tokens: cut there"]


def numbered(columns: Mapping[str, list[Any]]) -> Dataset:
    """A prepared data set: the columns with each row's length and number."""
    from datasets import Dataset

    ids = columns["input_ids"]
    return Dataset.from_dict({**columns, "length": [len(row) for row in ids], "row": list(range(len(ids)))})


def taken(rows: Dataset, model: PreTrainedModel, *, labelled: bool, keep: Sequence[str] = ()) -> Dataset:
    """A set that holds model inputs already: checked, then taken as it is, with lengths and row numbers.

    Args:
        rows: with input_ids.
        model: that is to read them.
        labelled: a column "labels" must be there.
        keep: further columns that stay.

    Raises:
        DataError: ids that the model does not take, masks of another length, no labels where they are needed.
    """
    if labelled:
        need_column(rows, "labels")
    vocabulary = vocabulary_of(model)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    beside = [name for name in ("attention_mask", "token_type_ids") if name in rows.column_names]
    for name in ("input_ids", *beside):
        _check_lists(rows, name)
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
    for name in beside:
        for number, (ids, values) in enumerate(zip(rows["input_ids"], rows[name], strict=True)):
            if len(values) != len(ids):
                raise DataError(
                    message(
                        "a prepared column that does not fit its token ids",
                        where=f"row {number}, column {name!r}",
                        expected=f"{len(ids)} numbers",
                        found=len(values),
                    )
                )
    kept = {"input_ids", "attention_mask", "token_type_ids", "labels", *keep}
    rows = rows.remove_columns([name for name in rows.column_names if name not in kept])
    rows = rows.add_column("length", [len(ids) for ids in rows["input_ids"]])
    return rows.add_column("row", list(range(len(rows))))


def _check_lists(rows: Dataset, name: str) -> None:
    """Refuse a column of model inputs that does not hold whole numbers: 2.5 would be cut to 2 without a word."""
    kind = str(getattr(getattr(rows.features[name], "feature", None), "dtype", rows.features[name]))
    if not kind.startswith(("int", "uint", "bool", "null")):
        raise DataError(
            message(
                "not lists of whole numbers", where=f"column {name!r}", expected="token ids", found=f"{kind} values"
            )
        )


def padded(
    features: Sequence[Mapping[str, Any]],
    model: PreTrainedModel,
    columns: Sequence[str] = ("token_type_ids",),
    *,
    side: str = "right",
) -> dict[str, Any]:
    """Padded batch: input_ids and attention_mask, shape (rows, longest), the columns asked for, and "row".

    Args:
        features: prepared rows.
        model: whose config names the padding id.
        columns: further columns of ids to pad where the rows have them.
        side: "left" for prompts that a decoder goes on with.
    """
    pad = model.config.get_text_config().pad_token_id or 0
    batch: dict[str, Any] = {"input_ids": stacked([feature["input_ids"] for feature in features], pad, side)}
    masks = [feature.get("attention_mask") or [1] * len(feature["input_ids"]) for feature in features]
    batch["attention_mask"] = stacked(masks, 0, side)
    for name in columns:
        if name in features[0]:
            batch[name] = stacked([feature[name] for feature in features], FILLS.get(name, 0), side)
    if "row" in features[0]:
        batch["row"] = [feature["row"] for feature in features]
    return batch


def stacked(rows: Sequence[Sequence[int]], fill: int, side: str = "right") -> Tensor:
    """Rows of numbers as one tensor, shape (rows, longest), filled up on one side."""
    import torch

    tensors = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=side)
