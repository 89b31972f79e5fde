"""Tokens hidden one at a time: what a masked language model makes of a text in which each is to be guessed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapters.errors import DataError, RequestError, message
from adapters.likelihood import IGNORED, measured, numbers
from adapters.modes import evaluating
from adapters.progress import Job, chunks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        "pseudo_perplexity", "loss" (per token), "token_accuracy" and "tokens" (how many were predicted).

    Raises:
        RequestError: the tokenizer has no mask.
        DataError: texts without tokens to predict, or that the model cannot take.

    Source: Salazar et al., 2020.
    """
    import numpy as np
    import torch

    from adapters.data import texts_in
    from adapters.tokens import encode

    need_mask(processor)
    columns, _ = encode(texts_in(texts, "text"), None, processor, model, max_length=max_length)
    special = set(processor.all_special_ids)
    sums = np.zeros(3)
    with evaluating(model), torch.inference_mode(), Job("measuring", len(texts), "texts"):
        for row in chunks(len(texts), 1):
            whole = {n: torch.as_tensor(values[row], device=model.device) for n, values in columns.items()}
            places = [place for place, token in enumerate(columns["input_ids"][row]) if token not in special]
            for begin in range(0, len(places), batch_size):
                picks = torch.as_tensor(places[begin : begin + batch_size], device=model.device)
                copies = {n: values.repeat(len(picks), 1) for n, values in whole.items()}
                index = torch.arange(len(picks), device=model.device)
                labels = torch.full_like(copies["input_ids"], IGNORED)
                labels[index, picks] = copies["input_ids"][index, picks]
                copies["input_ids"][index, picks] = processor.mask_token_id
                found = measured(model(**copies).logits, labels)
                sums += [float(part.sum()) for part in found]
    if not sums[2]:
        raise DataError(message("the texts hold no token to predict", where=f"{len(texts)} texts"))
    result = numbers([*sums.reshape(3, 1)])
    return {"pseudo_perplexity": result.pop("perplexity"), **result, "tokens": float(sums[2])}


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
