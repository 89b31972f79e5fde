"""Rows of which only a part is learnt: token ids, and for each whether it is; cut to a length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from adapters import chats, progress, tokens
from adapters.errors import DataError, RequestError, message
from adapters.generation import end_of, ends_of, without_end
from adapters.likelihood import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

Learnt: TypeAlias = "tuple[list[int], list[bool]]"  # a row's token ids, and for each whether it is learnt


def of_prompts(rows: Dataset, processor: Any, model: PreTrainedModel) -> list[Learnt]:
    """Prompts, and completions with an end token, which are learnt.

    Both are one text where the prompt's tokens stay what they are alone; where a token would cross the border, each is
    tokenised for itself. What is learnt behind a prompt is then what follows when the prompt alone is given.

    Raises:
        DataError: a row without tokens, or with ids that the model does not have.
    """
    vocabulary, end, ends = tokens.vocabulary_of(model), end_of(processor, model), ends_of(processor, model)
    prompts, completions = list(rows["prompt"]), list(rows["completion"])
    made = []
    for begin in progress.chunks(len(prompts), tokens.CHUNK):
        part = slice(begin, begin + tokens.CHUNK)
        both = [prompt + completion for prompt, completion in zip(prompts[part], completions[part], strict=True)]
        given = processor(prompts[part], truncation=False, verbose=False)["input_ids"]
        whole = processor(both, truncation=False, verbose=False)["input_ids"]
        for index, text in enumerate(both):
            prompt = without_end(given[index], ends)
            ids = without_end(whole[index], ends)
            if ids[: len(prompt)] != prompt:
                rest = processor(completions[begin + index], add_special_tokens=False, verbose=False)["input_ids"]
                ids = prompt + list(rest)
            tokens.check_ids(ids, begin + index, text, vocabulary)
            if end is not None:
                ids.append(end)
            made.append((ids, [place >= len(prompt) for place in range(len(ids))]))
    return made


def of_conversations(rows: Dataset, processor: Any, model: PreTrainedModel) -> list[Learnt]:
    """Conversations, of which the assistant's turns are learnt.

    Raises:
        DataError: what the chat template cannot render, ids that the model does not have.
        RequestError: a tokenizer that cannot tell which characters a token stands for.
    """
    if not processor.is_fast:
        raise RequestError(
            message("conversations need a fast tokenizer", where=type(processor).__name__, found="a slow one")
        )
    vocabulary, ends = tokens.vocabulary_of(model), ends_of(processor, model)
    made = []
    for number, turns in enumerate(rows["messages"]):
        ids, said = chats.learnt(turns, processor, ends, number)
        tokens.check_ids(ids, number, str(turns[-1]["content"]), vocabulary)
        made.append((ids, said))
    return made


def cut(made: list[Learnt], limit: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Prepared rows cut behind `limit` tokens, and what is said of it.

    A row of which nothing learnt is left teaches nothing and measures nothing: it is left out, counted and named.

    Raises:
        DataError: no row is left.
    """
    rows, shortened, dropped = [], 0, []
    for number, (ids, learnt) in enumerate(made):
        labels = [token if taken else IGNORED for token, taken in zip(ids, learnt, strict=True)][:limit]
        labels[0] = IGNORED  # nothing foretells the first token
        if all(label == IGNORED for label in labels):
            dropped.append(number)
            continue
        shortened += len(ids) > limit
        rows.append({"input_ids": ids[:limit], "labels": labels})
    if not rows:
        raise DataError(
            message(
                "no row has room for its answer",
                where=f"{limit} tokens a row",
                found=f"{len(made)} rows, the first of {len(made[0][0])} tokens",
                remedy="Take a greater max_length, or shorter prompts.",
            )
        )
    remarks = []
    if shortened:
        remarks.append(f"{shortened} of {len(made)} rows are longer than {limit} tokens: their answers are cut there")
    if dropped:
        shown = ", ".join(map(str, dropped[:5])) + (" ..." if len(dropped) > 5 else "")
        remarks.append(
            f"{len(dropped)} of {len(made)} rows are left out, nothing of their answers lies within {limit} tokens: "
            f"rows {shown}"
        )
    return rows, remarks


def packed(rows: list[dict[str, Any]], size: int) -> tuple[list[dict[str, Any]], str]:
    """Whole rows side by side in few blocks of at most `size` tokens, and what is said of it.

    Positions start at 0 with each row, by which transformers keeps the rows of a block from seeing each other. The
    longest rows come first, each to where it leaves least room (best fit decreasing). A row longer than `size` has a
    block of its own.
    """
    import bisect

    room: list[tuple[int, int]] = []  # (tokens left, number of the block), ascending
    blocks: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        length = len(row["input_ids"])
        place = bisect.bisect_left(room, (length, -1))
        if place < len(room):
            left, number = room.pop(place)
        else:
            left, number = max(size, length), len(blocks)
            blocks.append({"input_ids": [], "position_ids": [], "labels": []})
        block = blocks[number]
        block["input_ids"] += row["input_ids"]
        block["labels"] += row["labels"]
        block["position_ids"] += range(length)
        bisect.insort(room, (left - length, number))
    many = len(rows) / len(blocks)
    said = f"{len(rows)} rows are packed into {len(blocks)} blocks of up to {size} tokens: {many:.1f} rows each"
    return blocks, said


def endless(rows: list[dict[str, Any]], processor: Any, model: PreTrainedModel) -> list[str]:
    """What is said once where no learnt token is an end token."""
    if any(end in row["labels"] for row in rows for end in ends_of(processor, model)):
        return []
    return ["no answer ends with an end token: the model does not learn to stop"]
