"""Questions with long contexts as overlapping windows, and where an answer stands in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapters import progress, tokens
from adapters.errors import RequestError, message

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def encode(
    questions: Sequence[str],
    contexts: Sequence[str],
    processor: Any,
    model: PreTrainedModel,
    *,
    max_length: int | None = None,
    stride: int | None = None,
) -> tuple[dict[str, list[Any]], list[str]]:
    """Questions and contexts to model inputs, one row a window; no context is cut.

    Args:
        questions, contexts: of the same length.
        processor, model: a fast tokenizer and the model that reads its ids.
        max_length: tokens of a window, question and special tokens included; None for as many as both take.
        stride: tokens that neighbouring windows share; None for a third of the window.

    Returns:
        The tokenizer's columns; begins and ends (a token's characters in the context, -1 outside it); null (the place
        that stands for no answer); example (the row that the window comes from) and context. And remarks.

    Raises:
        RequestError: windows that would not move on.
        DataError: ids that the model does not have.
    """
    import numpy as np

    limit, vocabulary = tokens.limit_of(max_length, processor, model), tokens.vocabulary_of(model)
    stride = limit // 3 if stride is None else stride
    room = limit - processor.num_special_tokens_to_add(pair=True)
    if not stride < room // 2:
        raise RequestError(
            message("windows overlap too far", where="stride", expected=f"below {room // 2} tokens", found=stride)
        )
    gap = _gap(processor)
    columns: dict[str, list[Any]] = {}
    cut, many = 0, 0
    for start in progress.chunks(len(questions), tokens.CHUNK):
        part = list(contexts[start : start + tokens.CHUNK])
        short, shortened = _shortened(
            list(questions[start : start + tokens.CHUNK]), processor, room - stride - limit // 8 - len(gap)
        )
        cut += shortened
        found = processor(
            [question + gap for question in short],
            part,
            truncation="only_second",
            max_length=limit,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        samples = found.pop("overflow_to_sample_mapping")
        many += sum(1 for count in np.bincount(samples) if count > 1)
        for window, sample in enumerate(samples):
            ids, context = found["input_ids"][window], part[sample]
            tokens.check_ids(ids, start + sample, context, vocabulary)
            spans = np.asarray(found["offset_mapping"][window], dtype=np.int32).reshape(-1, 2)
            for place, side in enumerate(found.sequence_ids(window)):
                begin, end = spans[place]
                if side != 1 or not context[begin:end].strip():
                    spans[place] = -1
            null = ids.index(processor.cls_token_id) if processor.cls_token_id in ids else 0
            made = {"begins": spans[:, 0], "ends": spans[:, 1], "null": null, "context": context}
            for name, value in {**made, "example": start + sample}.items():
                columns.setdefault(name, []).append(value)
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            if name in found:
                columns.setdefault(name, []).extend(found[name])
    remarks = []
    if many:
        windows = len(columns["input_ids"])
        remarks.append(
            f"{many} of {len(questions)} contexts are longer than {limit} tokens: read in {windows} windows that share "
            f"{stride} tokens"
        )
    if cut:
        remarks.append(f"{cut} of {len(questions)} questions leave no room for a context: cut there")
    return columns, remarks


def _gap(processor: Any) -> str:
    """What goes between question and context where the tokenizer puts nothing there: the end of a line."""
    sides = processor("a", "b").sequence_ids(0)
    if 0 not in sides or 1 not in sides:
        return ""  # a tokenizer that knows neither letter tells nothing
    return "\n" if None not in sides[sides.index(0) : sides.index(1)] else ""


def _shortened(questions: list[str], processor: Any, limit: int) -> tuple[list[str], int]:
    """Questions of at most so many tokens, and how many were cut."""
    found = processor(questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    cut = 0
    for number, ids in enumerate(found["input_ids"]):
        if len(ids) > limit:
            questions[number] = questions[number][: found["offset_mapping"][number][limit - 1][1]]
            cut += 1
    return questions, cut


def place(begins: Sequence[int], ends: Sequence[int], start: int, end: int) -> tuple[int, int] | None:
    """The first and last token of the characters from `start` to `end`; None where the window does not hold them all.

    Args:
        begins, ends: the characters of each token, -1 for tokens outside the context.
        start, end: of the answer, without spaces around it.
    """
    inside = [n for n, begin in enumerate(begins) if begin >= 0 and ends[n] > start and begin < end]
    if not inside or begins[inside[0]] > start or ends[inside[-1]] < end:
        return None
    return inside[0], inside[-1]


def best_span(
    start_logits: Any, end_logits: Any, allowed: Any, null: int, longest: int
) -> tuple[float, int, int, float]:
    """The likeliest answer of a window, and how likely the window holds none.

    Start and end are taken as independent, each distributed over the context's tokens and the place that stands for no
    answer, as transformers' question answering pipeline took them (up to transformers 4). All spans are looked at.

    Args:
        start_logits, end_logits: shape (tokens,).
        allowed: where an answer may begin and end, shape (tokens,).
        null: the place that stands for no answer.
        longest: tokens of an answer.

    Returns:
        Log-probability, first and last token of the likeliest answer (minus infinity where there is none); and the
        log-probability of no answer.
    """
    import numpy as np
    from scipy.special import log_softmax

    pool = allowed.copy()
    pool[null] = True
    starts, ends = (
        log_softmax(np.where(pool, logits.astype("float64"), -np.inf)) for logits in (start_logits, end_logits)
    )
    nothing = float(starts[null] + ends[null])
    starts, ends = (np.where(allowed, side, -np.inf) for side in (starts, ends))
    best = (-np.inf, 0, 0)
    for length in range(min(longest, len(starts))):
        scores = starts[: len(starts) - length] + ends[length:]
        first = int(scores.argmax())
        if scores[first] > best[0]:
            best = (float(scores[first]), first, first + length)
    return *best, nothing
