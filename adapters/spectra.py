"""The singular values of a matrix in four numbers, exactly where that is affordable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from adapters import lowrank

if TYPE_CHECKING:
    from torch import Tensor

WIDE = 1024  # rows and columns up to which all singular values of a matrix that is no product are taken
SQUARED = 1 << 22  # elements from which they are taken from the smaller Gram matrix
ROUNDS = 8  # power iterations for the greatest one of a larger matrix


@final
@dataclass(frozen=True)
class Spectrum:
    """The singular values of a change in four numbers.

    Attributes:
        spectral: the greatest.
        effective: exp of the entropy of the values divided by their sum (Roy and Vetterli, 2007); None where a large
            matrix was not decomposed.
        stable: squared Frobenius norm over squared spectral norm.
        rank: values that are no rounding; None where it was not decomposed.
    """

    spectral: float
    effective: float | None
    stable: float
    rank: int | None


def norm_of(tensor: Tensor) -> float:
    """Frobenius norm, summed in float64."""
    import torch

    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def rounding_of(old: Tensor, delta: Tensor) -> float:
    """Spectral norm of what float32 rounds of a matrix's entries, as of random numbers of that size."""
    import torch

    if delta.ndim < 2:
        return 0.0
    rows, columns = delta.shape[0], delta[0].numel()
    return float(torch.finfo(torch.float32).eps * norm_of(old) * (rows**-0.5 + columns**-0.5))


def spectrum_of(delta: Tensor, noise: float = 0.0) -> Spectrum | None:
    """The spectrum of a change that is there as a tensor; None for vectors.

    Args:
        delta: any shape; what has more than two axes as the matrix of the first by all others.
        noise: singular values up to this are rounding.
    """
    import torch

    if delta.ndim < 2 or not delta.numel():
        return None
    matrix = delta.flatten(1)
    short, long = sorted(matrix.shape)
    if short > WIDE:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            spectral = float(torch.svd_lowrank(matrix.float(), 4, niter=ROUNDS)[1][0])
        norm = norm_of(delta)
        return Spectrum(spectral, None, (norm / spectral) ** 2 if spectral else 0.0, None)
    if matrix.numel() > SQUARED:
        wide = matrix if matrix.shape[0] == short else matrix.T
        gram = torch.zeros(short, short, dtype=torch.float64)
        for begin in range(0, long, 1 << 14):
            part = wide[:, begin : begin + (1 << 14)].double()
            gram.addmm_(part, part.T)
        values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)
        noise = max(noise, float(values[0]) * torch.finfo(torch.float64).eps ** 0.5 * long**0.5)
    else:
        values = torch.linalg.svdvals(matrix.double())
    return summed_up(values, long, noise)


def summed_up(values: Tensor, longest: int, noise: float = 0.0) -> Spectrum:
    """Four numbers of singular values in descending order."""
    import torch

    spectral = float(values[0]) if values.numel() else 0.0
    if not spectral:
        return Spectrum(0.0, 0.0, 0.0, 0)
    rank = min(lowrank.rank_of(values, longest), int((values > noise).sum()))
    shares = values / values.sum()
    entropy = float(torch.special.entr(shares).sum())
    return Spectrum(spectral, math.exp(entropy), float(values.norm()) ** 2 / spectral**2, rank)
