"""Texts as whole documents of token ids, one row each or packed into blocks that documents share without meeting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from adapters import progress
from adapters.errors import RequestError, message
from adapters.generation import end_of, ends_of, without_end
from adapters.likelihood import IGNORED
from adapters.modes import evaluating
from adapters.tokens import CHUNK, check_ids, vocabulary_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

BLOCK = 1024  # tokens of a block at most, where the request names no length


@final
@dataclass(frozen=True)
class Document:
    """A text's token ids, special tokens included, and the bytes of text that each of them stands for.

    Attributes:
        ids: token ids, the end token last.
        sizes: bytes of utf-8 text, one number a token; empty where the tokenizer does not tell.
    """

    ids: list[int]
    sizes: list[int]


def read(texts: Sequence[str], processor: Any, model: PreTrainedModel) -> Iterator[Document]:
    """Every text as a document, uncut, with one end token.

    Raises:
        DataError: a row without tokens, or with ids that the model does not have.
    """
    vocabulary, end, ends = vocabulary_of(model), end_of(processor, model), ends_of(processor, model)
    for begin in progress.chunks(len(texts), CHUNK):
        chunk = list(texts[begin : begin + CHUNK])
        encoded = processor(chunk, truncation=False, verbose=False, return_offsets_mapping=processor.is_fast)
        for index, text in enumerate(chunk):
            ids = without_end(encoded["input_ids"][index], ends)
            check_ids(ids, begin + index, text, vocabulary)
            sizes = _sizes(text, encoded["offset_mapping"][index][: len(ids)]) if processor.is_fast else []
            if end is not None:
                ids.append(end)
                sizes += [len(text.encode()) - sum(sizes)] if sizes else []
            yield Document(ids, sizes)


def _sizes(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Bytes from the end of the token before to the end of each token: nothing is counted twice or left out."""
    sizes, reached = [], 0
    for _, stop in offsets:
        sizes.append(len(text[reached:stop].encode()) if stop > reached else 0)
        reached = max(reached, stop)
    return sizes


def labels_of(ids: Sequence[int], start: int = 1) -> list[int]:
    """The ids as labels, -100 before `start`; nothing foretells the first token."""
    start = max(1, start)
    return [IGNORED] * min(start, len(ids)) + list(ids[start:])


def row_of(document: Document, limit: int) -> dict[str, Any]:
    """One document as one prepared row, cut behind `limit` tokens."""
    ids = document.ids[:limit]
    row: dict[str, Any] = {"input_ids": ids, "labels": labels_of(ids)}
    return row | {"bytes": sum(document.sizes[1:limit])} if document.sizes else row


def blocks(documents: Iterator[Document], size: int) -> list[dict[str, Any]]:
    """Documents one after the other in blocks of `size` tokens; only the last block may be shorter.

    Positions start at 0 with each document, by which transformers keeps documents of a block from seeing each other.
    A document that goes on in the next block starts there as a new one, with the last token of the block before as
    its first: so every token but a document's first is foretold exactly once.
    """
    found: list[dict[str, Any]] = []
    block: dict[str, Any] = {}
    for document in documents:
        begin = 0
        while begin < len(document.ids) - 1:
            if not block or size - len(block["input_ids"]) < 2:
                block = {"input_ids": [], "position_ids": [], "labels": [], "bytes": 0}
                found.append(block)
            piece = document.ids[begin : begin + size - len(block["input_ids"])]
            block["input_ids"] += piece
            block["position_ids"] += range(len(piece))
            block["labels"] += labels_of(piece)
            block["bytes"] += sum(document.sizes[begin + 1 : begin + len(piece)])
            begin += len(piece) - 1
    return found


# ---------------------------------------------------------------------- what a model must keep to

TOKENS = 5  # of each document of the trial
BOUND = {"float32": 1e-3, "float64": 1e-3}  # of the logits' spread; 5e-2 for coarser dtypes


def refuse_foresight(model: PreTrainedModel) -> None:
    """Refuse a model that sees the tokens which it is to foretell, by trying it on a short document.

    Raises:
        RequestError: a model that reads both ways (a BERT without is_decoder).
    """
    import torch

    first, _ = _tried(model)
    other = first.clone()
    other[0, -1] = (first[0, -1] + 1) % vocabulary_of(model)
    with evaluating(model), torch.no_grad():
        if _differ(model, _logits(model, first)[:, :-1], _logits(model, other)[:, :-1]):
            raise RequestError(
                message(
                    "the model sees the tokens that it is to foretell",
                    where=type(model).__name__,
                    expected="a model that reads from left to right",
                    remedy="Take a decoder, or load it with load={'is_decoder': True}.",
                )
            )


def confined(model: PreTrainedModel) -> bool:
    """Whether two short documents in one block have the logits that each has alone.

    Positions tell transformers where a document begins; a model that takes none, or that carries a state from token to
    token, lets documents see each other.
    """
    import torch

    first, second = _tried(model)
    places = torch.arange(TOKENS, device=model.device).repeat(2)[None]
    with evaluating(model), torch.no_grad():
        alone = torch.cat([_logits(model, first), _logits(model, second)], 1)
        try:
            together = _logits(model, torch.cat([first, second], 1), position_ids=places)
        except TypeError:  # no such argument
            return False
    return not _differ(model, together, alone)


def need_confined(model: PreTrainedModel) -> None:
    """Refuse packing that this model cannot do.

    Raises:
        RequestError: documents of one block would see each other.
    """
    if not confined(model):
        raise RequestError(
            message(
                "documents of one block would see each other",
                where=f"packing on {type(model).__name__}",
                expected="the logits that each document has alone",
                remedy="Say packing=False.",
            )
        )


def _tried(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Two short documents, shape (1, tokens) each."""
    import torch

    ids = torch.arange(2 * TOKENS).mul(7).add(1).remainder(vocabulary_of(model)).to(model.device)[None]
    return ids[:, :TOKENS], ids[:, TOKENS:]


def _logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False, **inputs).logits
    return found.float()


def _differ(model: PreTrainedModel, one: Tensor, other: Tensor) -> bool:
    bound = BOUND.get(str(model.dtype).removeprefix("torch."), 5e-2)
    return float((one - other).abs().max()) > bound * max(float(other.std()), 1e-6)
