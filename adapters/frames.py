"""Token sequences in the tokenizer's frame: its special tokens around one or two of them, and blocks of many texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from adapters import progress
from adapters.errors import RequestError, message
from adapters.tokens import CHUNK, check_ids, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNBOUNDED = 1 << 20  # tokens: neither tokenizer nor model names a length
PROBE = "a"  # any text that becomes tokens


@final
@dataclass(frozen=True)
class Frame:
    """What a tokenizer puts around token sequences, read off what it makes of a short text.

    Attributes:
        gaps: special tokens before the first sequence, between two, and after the last.
        gap_types: their token types, in the same form.
        types: the token type of each sequence.
        typed: whether the tokenizer gives token types at all.
    """

    gaps: tuple[tuple[int, ...], ...]
    gap_types: tuple[tuple[int, ...], ...]
    types: tuple[int, ...]
    typed: bool

    @property
    def size(self) -> int:
        """How many special tokens there are."""
        return sum(len(gap) for gap in self.gaps)

    def around(self, *sequences: Sequence[int]) -> dict[str, list[int]]:
        """Model inputs of one row: the sequences with the special tokens, and the token types where there are any."""
        ids, types = list(self.gaps[0]), list(self.gap_types[0])
        for place, sequence in enumerate(sequences):
            ids += [*sequence, *self.gaps[place + 1]]
            types += [*[self.types[place]] * len(sequence), *self.gap_types[place + 1]]
        return {"input_ids": ids, **({"token_type_ids": types} if self.typed else {})}


def frame_of(processor: Any, sequences: int = 1) -> Frame:
    """The frame around one sequence, or around two.

    Raises:
        RequestError: a tokenizer that puts nothing between two texts.
    """
    encoded = processor(*[PROBE] * sequences, return_special_tokens_mask=True)
    ids, special = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    types = list(encoded.get("token_type_ids") or [0] * len(ids))
    gaps: list[list[int]] = [[]]
    gap_types: list[list[int]] = [[]]
    own: list[int] = []
    inside = False
    for token, is_special, kind in zip(ids, special, types, strict=True):
        if is_special:
            gaps[-1].append(token)
            gap_types[-1].append(kind)
        elif not inside:  # a sequence begins: the next special token belongs to the gap after it
            own.append(kind)
            gaps.append([])
            gap_types.append([])
        inside = not is_special
    if len(own) != sequences:
        raise RequestError(
            message(
                "the tokenizer puts nothing between two texts",
                where=type(processor).__name__,
                expected="a separator, as BERT's [SEP]",
                found=f"the ids {ids}",
            )
        )
    return Frame(
        tuple(map(tuple, gaps)), tuple(map(tuple, gap_types)), tuple(own), encoded.get("token_type_ids") is not None
    )


def bare(texts: Sequence[str], processor: Any, model: PreTrainedModel, *, start: int = 0) -> list[list[int]]:
    """The token ids of texts without special tokens, whole.

    Args:
        texts: any number.
        processor, model: the tokenizer and the model that reads its ids.
        start: the number of the first row, for messages.

    Raises:
        DataError: a text without tokens, or with ids that the model does not have.
    """
    vocabulary = vocabulary_of(model)
    found: list[list[int]] = []
    for begin in progress.chunks(len(texts), CHUNK):
        part = list(texts[begin : begin + CHUNK])
        encoded = processor(part, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        for index, ids in enumerate(encoded):
            check_ids(ids, start + begin + index, part[index], vocabulary)
        found += encoded
    return found


def block_size(limit: int, frame: Frame) -> int:
    """The tokens of a block beside its special ones.

    Raises:
        RequestError: neither the option nor the tokenizer nor the model names a length.
    """
    if limit >= UNBOUNDED:
        raise RequestError(
            message("no length for blocks", where="packing", expected="a number of tokens", remedy="Give max_length.")
        )
    return limit - frame.size


def blocks(documents: Sequence[Sequence[int]], separator: Sequence[int], size: int) -> Iterator[list[int]]:
    """The documents one after the other, a separator between two, cut into blocks; the last may be shorter.

    A block may begin or end inside a document; nothing is lost (Liu et al., 2019, FULL-SENTENCES).
    """
    block: list[int] = []
    for number, document in enumerate(documents):
        waiting = [*(separator if number else ()), *document]
        while waiting:
            room = size - len(block)
            block += waiting[:room]
            waiting = waiting[room:]
            if len(block) == size:
                yield block
                block = []
    if block:
        yield block


def pair_cut(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of each of two sequences fit: the longer one gives way first."""
    half = room // 2
    if first + second <= room:
        return first, second
    if first <= half:
        return first, room - first
    if second <= room - half:
        return room - second, second
    return half, room - half
