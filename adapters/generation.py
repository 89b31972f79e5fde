"""Token ids that a model goes on with, as many as it may say, and nothing behind the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel

NEW_TOKENS = 256  # of an answer, where neither the request nor the generation config says: as transformers' pipeline


def ends_of(processor: Any, model: PreTrainedModel) -> tuple[int, ...]:
    """The token ids at which generation stops: the generation config's, else the model's, else the tokenizer's."""
    for found in (model.generation_config.eos_token_id, model.config.get_text_config(decoder=True).eos_token_id):
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return () if processor.eos_token_id is None else (int(processor.eos_token_id),)


def end_of(processor: Any, model: PreTrainedModel) -> int | None:
    """The end token that a text is given: the tokenizer's, where generation stops at it, else the first that does."""
    ends = ends_of(processor, model)
    own = processor.eos_token_id
    return int(own) if own in ends else (ends[0] if ends else None)


def without_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Ids without the end tokens that a tokenizer has put behind them."""
    stop = len(ids)
    while stop and ids[stop - 1] in ends:
        stop -= 1
    return list(ids[:stop])


def budget(wanted: int | None, model: PreTrainedModel, limit: int) -> int:
    """Tokens that an answer may have: the request's, the generation config's, or 256 but half of the model's length.

    Args:
        wanted: the request's.
        model: whose generation config counts.
        limit: tokens that the model takes at once; one at least is left for the prompt.
    """
    wanted = wanted or model.generation_config.max_new_tokens
    return min(wanted, limit - 1) if wanted else max(1, min(NEW_TOKENS, limit // 2))


def generated(model: PreTrainedModel, inputs: dict[str, Tensor], ends: Sequence[int], **options: Any) -> Tensor:
    """What the model goes on with, shape (rows, new tokens), -100 behind an end token.

    Args:
        inputs: input_ids and attention_mask, shape (rows, tokens); padded on the left for decoders.
        ends: token ids at which an answer stops.
        **options: of `generate`; None leaves the generation config's value.
    """
    import torch

    generate: Any = model.generate
    given = {name: value for name, value in options.items() if value is not None}
    whole = generate(
        **inputs,
        **given,
        eos_token_id=list(ends) or None,
        pad_token_id=model.config.get_text_config(decoder=True).pad_token_id,
        num_return_sequences=1,
        return_dict_in_generate=False,
    )
    begin = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    new: Tensor = whole[:, begin:]
    ended = torch.zeros_like(new, dtype=torch.bool)
    for end in ends:
        ended |= new == end
    behind = ended.int().cumsum(-1) - ended.int() > 0
    return new.masked_fill(behind, -100)


def texts(ids: np.ndarray[Any, Any], processor: Any) -> list[str]:
    """Generated ids as texts, special tokens left out."""
    return [str(processor.decode(row[row >= 0].tolist(), skip_special_tokens=True)) for row in ids]
