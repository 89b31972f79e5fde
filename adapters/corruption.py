"""Which tokens of a row are hidden from the model, and what stands in their place; drawn, never changed afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapters.errors import RequestError, message

if TYPE_CHECKING:
    import numpy as np

FIXED = 918_273_645  # seed of what is drawn while evaluating: the same in every run, and no run's own


def count_of(share: float, tokens: int) -> int:
    """A share of the tokens as a whole number, one at least where there are any."""
    return min(tokens, max(1, round(share * tokens)))


def chosen(candidates: Sequence[int], count: int, generator: np.random.Generator) -> list[int]:
    """Some of the places at random, in order."""
    return sorted(generator.permutation(len(candidates))[:count].tolist()) if candidates else []


def chosen_words(words: Sequence[int], count: int, generator: np.random.Generator) -> list[int]:
    """Places at random, a word's tokens all or none; at most `count` unless the first word drawn has more.

    Args:
        words: each place's word, by any number; equal neighbours are one word.
        count: how many places.
    """
    groups: list[list[int]] = []
    for place, word in enumerate(words):
        if groups and words[groups[-1][-1]] == word:
            groups[-1].append(place)
        else:
            groups.append([place])
    taken: list[int] = []
    for index in generator.permutation(len(groups)):
        if not taken or len(taken) + len(groups[index]) <= count:
            taken += groups[index]
        if len(taken) >= count:
            break
    return sorted(taken)


def replaced(
    ids: Sequence[int],
    mask: int,
    ordinary: np.ndarray[Any, Any],
    generator: np.random.Generator,
    *,
    random_share: float,
    kept_share: float,
) -> list[int]:
    """What the model sees in the place of hidden tokens: the mask, a random token, or the token itself.

    Args:
        ids: the hidden tokens.
        mask: the mask's id.
        ordinary: the ids that a random token is drawn from.
        random_share, kept_share: how often it is a random token, or the token itself.

    Source: Devlin et al., 2019 (80, 10 and 10 %).
    """
    lots = generator.random(len(ids))
    others = ordinary[generator.integers(0, len(ordinary), len(ids))]
    return [
        int(other) if lot < random_share else token if lot < random_share + kept_share else mask
        for token, lot, other in zip(ids, lots, others, strict=True)
    ]


def ordinary_ids(processor: Any, vocabulary: int) -> np.ndarray[Any, Any]:
    """The ids of the tokenizer that are no special tokens and that the model has."""
    import numpy as np

    return np.setdiff1d(np.arange(min(len(processor), vocabulary)), processor.all_special_ids)


def noise_spans(
    length: int, share: float, mean: float, most: int, generator: np.random.Generator
) -> list[tuple[int, int]]:
    """Spans of tokens to hide: (start, end), in order, a clear token at least between two.

    Args:
        length: tokens of the row.
        share: of the tokens that are hidden.
        mean: tokens of a span on average.
        most: how many spans at most.

    Source: Raffel et al., 2020 (T5): as many hidden tokens and spans as the shares say, divided at random. There a row
    ends with a hidden span; here it may begin or end with either, or short rows would always hide their end.
    """
    if length < 2:
        return []
    noise = min(max(1, round(share * length)), length - 1)
    clear = length - noise
    spans = min(max(1, round(noise / mean)), most, noise, clear + 1)
    hidden = _divided(noise, spans, generator)
    between = _divided(clear + 2, spans + 1, generator)
    between[0] -= 1  # the outer two may be empty
    found, place = [], 0
    for seen, gone in zip(between, hidden, strict=False):
        found.append((place + seen, place + seen + gone))
        place += seen + gone
    return found


def _divided(total: int, parts: int, generator: np.random.Generator) -> list[int]:
    """A number as a sum of `parts` numbers > 0, every such sum equally likely."""
    cuts = [0, *sorted((generator.permutation(total - 1)[: parts - 1] + 1).tolist()), total]
    return [after - before for before, after in itertools.pairwise(cuts)]


def infilling_spans(length: int, share: float, mean: float, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Spans to hide, each behind one mask: (start, end), in order, not overlapping; an empty span only inserts a mask.

    Args:
        length: tokens of the row.
        share: of the tokens that are hidden.
        mean: of the Poisson distribution that a span's length is drawn from.

    Source: Lewis et al., 2020 (BART, text infilling).
    """
    budget = count_of(share, length)
    sizes: list[int] = []
    while sum(sizes) < budget:
        sizes.append(min(int(generator.poisson(mean)), budget - sum(sizes)))
    while len(sizes) > budget:  # no more masks than tokens hidden: a row never grows
        sizes.remove(0)
    clear = length - sum(sizes)
    # Every place between clear tokens is as likely as another to hold the next span.
    starts = sorted(generator.integers(0, clear + 1, len(sizes)).tolist())
    found, gone = [], 0
    for start, size in zip(starts, sizes, strict=True):
        found.append((start + gone, start + gone + size))
        gone += size
    return found


def share_faults(**shares: float) -> list[str]:
    """What is wrong with shares, which lie from 0 to below 1."""
    return [
        message("a wrong value", where=name, expected="a share from 0 to below 1", found=value)
        for name, value in shares.items()
        if not 0 <= value < 1
    ]


def refuse(faults: Sequence[str]) -> None:
    """Raise what was found wrong with a task's options, all at once.

    Raises:
        RequestError: there is something.
    """
    if faults:
        raise RequestError(*faults)
