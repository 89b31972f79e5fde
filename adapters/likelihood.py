"""How likely a language model makes the tokens that it should say: loss, perplexity, accuracy, and their floor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from adapters.chunked import Logits

IGNORED = -100  # the label of a token that is not learnt


def items(labels: Tensor) -> int:
    """The number of tokens that are learnt."""
    return int((labels != IGNORED).sum())


def loss(logits: Tensor | Logits, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Cross-entropy in nats, summed over the learnt tokens of the batch, divided by those of the global batch.

    Args:
        logits: shape (rows, tokens, vocabulary), each in the place of the token that it foretells; or what they would
            be made of, a chunk at a time.
        labels: shape (rows, tokens), -100 where nothing is learnt.
        num_items_in_batch: learnt tokens of the global batch; None means this batch alone.
    """
    import torch
    from torch.nn import functional

    if isinstance(logits, torch.Tensor):
        learnt = labels != IGNORED
        total = functional.cross_entropy(logits[learnt].float(), labels[learnt], reduction="sum")
    else:
        total = logits.nats(labels)
    return total / (max(1, items(labels)) if num_items_in_batch is None else num_items_in_batch)


def measured(logits: Tensor | Logits, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per row, shape (rows,): the summed cross-entropy in nats, tokens that the model puts first, learnt tokens.

    Sums instead of logits, so that an evaluation keeps three numbers a row.
    """
    import torch
    from torch.nn import functional

    learnt = labels != IGNORED
    if isinstance(logits, torch.Tensor):
        picked, truth = logits[learnt].float(), labels[learnt]
        found, right = functional.cross_entropy(picked, truth, reduction="none"), picked.argmax(-1) == truth
    else:
        found, right = logits.answers(labels)
    nats = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
    nats[learnt] = found.double()
    hits = torch.zeros_like(labels)
    hits[learnt] = right.long()
    return nats.sum(-1), hits.sum(-1), learnt.sum(-1)


def numbers(found: Sequence[np.ndarray[Any, Any]], sizes: Sequence[int] | None = None) -> dict[str, float]:
    """Loss in nats a token, perplexity and token accuracy, exact over all learnt tokens.

    Args:
        found: what `measured` gave.
        sizes: bytes of text that the learnt tokens of each row stand for: adds "bits_per_byte", which models with
            different vocabularies can be compared by.
    """
    nats, hits, learnt = (float(part.astype("float64").sum()) for part in found[:3])
    mean = nats / max(learnt, 1.0)
    result = {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "token_accuracy": hits / max(learnt, 1.0)}
    total = sum(sizes) if sizes is not None else 0
    return result | {"bits_per_byte": nats / math.log(2) / total} if total else result


def unigram(
    seen: Iterable[Sequence[int]],
    truth: Sequence[Sequence[int]],
    vocabulary: int,
    sizes: Sequence[int] | None = None,
) -> dict[str, float]:
    """The numbers of a model that knows how often each token occurs in training and never looks at the context.

    Each of the `vocabulary` tokens is counted once more than it was seen (Laplace), so that none is impossible.

    Args:
        seen, truth: labels of training and test rows, -100 where nothing is learnt.
        sizes: as for `numbers`.
    """
    import numpy as np

    counts = np.ones(vocabulary, dtype="float64")
    for labels in seen:
        row = np.asarray(labels)
        counts += np.bincount(row[row != IGNORED], minlength=vocabulary)
    cost = -np.log(counts / counts.sum())
    best = int(counts.argmax())
    rows = [row[row != IGNORED] for row in map(np.asarray, truth)]
    nats = np.asarray([cost[row].sum() for row in rows])
    hits = np.asarray([(row == best).sum() for row in rows])
    return numbers((nats, hits, np.asarray([len(row) for row in rows])), sizes)
