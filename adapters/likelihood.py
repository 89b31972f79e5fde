"""How likely a model finds tokens: loss, perplexity and accuracy over the tokens that it had to predict."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from adapters.errors import DataError, RequestError, message

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel

IGNORED = -100  # the label of a token that is not predicted
LARGEST = 700.0  # loss above which a perplexity leaves the range of floats


def items(labels: Tensor) -> int:
    """The tokens that are predicted."""
    return int((labels != IGNORED).sum())


def loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Cross-entropy over the tokens that are predicted, summed and divided by those of the whole global batch.

    Args:
        logits: shape (rows, tokens, vocabulary); token i predicts label i.
        labels: shape (rows, tokens), -100 where nothing is predicted.
        num_items_in_batch: predicted tokens of the global batch; None means this batch alone.
    """
    from torch.nn import functional

    asked = labels != IGNORED
    total = functional.cross_entropy(logits[asked].float(), labels[asked], reduction="sum")
    return total / (max(items(labels), 1) if num_items_in_batch is None else num_items_in_batch)


def measured(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed loss, predicted tokens and right answers of each row, shape (rows, 3)."""
    import torch
    from torch.nn import functional

    asked = labels != IGNORED
    rows = asked.nonzero()[:, 0]
    scores, truth = logits[asked].float(), labels[asked]
    each = functional.cross_entropy(scores, truth, reduction="none")
    right = (scores.argmax(-1) == truth).float()
    parts = torch.stack([each, torch.ones_like(each), right], -1)
    return torch.zeros((len(labels), 3), device=logits.device).index_add_(0, rows, parts)


def metrics(found: np.ndarray[Any, Any]) -> dict[str, float]:
    """Loss and perplexity over all predicted tokens, each counting alike, and the share that is right.

    Args:
        found: what `measured` gave, shape (rows, 3).
    """
    total, count, right = (float(value) for value in found.astype("float64").sum(0))
    mean = total / max(count, 1.0)
    return {"loss": mean, "perplexity": math.exp(min(mean, LARGEST)), "accuracy": right / max(count, 1.0)}


def unigram(seen: Iterable[Sequence[int]], asked: Iterable[Sequence[int]], vocabulary: int) -> dict[str, float]:
    """The metrics of a model that knows how often each token occurs and nothing else.

    Args:
        seen: the labels of the training rows, -100 where there is none.
        asked: the labels that are to be predicted.
        vocabulary: how many tokens there are; each is counted once more than it was seen.
    """
    import numpy as np

    counts = Counter(token for row in seen for token in row if token != IGNORED)
    total = sum(counts.values()) + vocabulary
    best = max(counts, key=lambda token: counts[token], default=0)
    rows = [
        [-math.log((counts[token] + 1) / total), 1.0, float(token == best)]
        for row in asked
        for token in row
        if token != IGNORED
    ]
    return metrics(np.asarray(rows or [[0.0, 0.0, 0.0]]))


def pseudo_perplexity(
    model: PreTrainedModel,
    processor: Any,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    batch_size: int = 32,
) -> dict[str, float]:
    """The pseudo-perplexity of a masked language model: each token is masked in turn and predicted from all others.

    Args:
        model: with a masked-language head.
        processor: its tokenizer.
        texts: each is cut to what the model takes.
        max_length: tokens that a text is cut to; None for as many as tokenizer and model take.
        batch_size: masked copies of a text per forward pass.

    Returns:
        "pseudo_perplexity", "loss" (per token), "accuracy" and "tokens" (how many were predicted).

    Raises:
        RequestError: the tokenizer has no mask.
        DataError: texts without tokens to predict, or that the model cannot take.

    Source: Salazar et al., 2020.
    """
    import torch

    from adapters.data import texts_in
    from adapters.tokens import encode

    need_mask(processor)
    columns, _ = encode(texts_in(texts, "text"), None, processor, model, max_length=max_length)
    special = set(processor.all_special_ids)
    sums = torch.zeros(3, dtype=torch.float64)
    was_training = model.training
    model.train(False)
    try:
        with torch.inference_mode():
            for row in range(len(texts)):
                whole = {n: torch.as_tensor(values[row], device=model.device) for n, values in columns.items()}
                places = [place for place, token in enumerate(columns["input_ids"][row]) if token not in special]
                for begin in range(0, len(places), batch_size):
                    picks = torch.as_tensor(places[begin : begin + batch_size], device=model.device)
                    copies = {n: values.repeat(len(picks), 1) for n, values in whole.items()}
                    index = torch.arange(len(picks), device=model.device)
                    labels = torch.full_like(copies["input_ids"], IGNORED)
                    labels[index, picks] = copies["input_ids"][index, picks]
                    copies["input_ids"][index, picks] = processor.mask_token_id
                    sums += measured(model(**copies).logits, labels).sum(0).double().cpu()
    finally:
        model.train(was_training)
    if not sums[1]:
        raise DataError(message("the texts hold no token to predict", where=f"{len(texts)} texts"))
    found = metrics(sums.numpy()[None])
    return {
        "pseudo_perplexity": found["perplexity"],
        "loss": found["loss"],
        "accuracy": found["accuracy"],
        "tokens": float(sums[1]),
    }


def need_mask(processor: Any) -> None:
    """Refuse a tokenizer without a mask.

    Raises:
        RequestError: there is no tokenizer, or it has no mask token.
    """
    from adapters.tokens import need_tokenizer

    need_tokenizer(processor)
    if getattr(processor, "mask_token_id", None) is None:
        raise RequestError(
            message(
                "the tokenizer has no mask token",
                where=type(processor).__name__,
                expected="a backbone trained by masking, as BERT",
                remedy="Take another backbone; causal language models have the task 'causal-lm'.",
            )
        )
