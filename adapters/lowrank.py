"""Low-rank products as pairs of factors: summed, brought to a rank, found in a matrix; each with its exact error.

A change of rank r is kept as up @ down, never as the product, as long as it came as factors: sums are concatenations,
and the singular values of a product are those of a small matrix between two QR decompositions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from adapters.errors import RequestError, message

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.edits import AddLowRank, AddLowRanks

EXACT = 1 << 22  # elements up to which a matrix is decomposed in float64
WIDE = 1024  # rows and columns from which a small rank is looked for at random (Halko et al., 2011)
ROUNDS = 8  # power iterations of that search
MORE = 16  # directions beyond the rank that it keeps


@final
@dataclass(frozen=True)
class Factors:
    """up @ down.

    Attributes:
        down: shape (r, in).
        up: shape (out, r).
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """Columns of up."""
        return int(self.down.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return int(self.up.shape[0]), int(self.down.shape[1])

    def padded(self, rank: int) -> Factors:
        """The same product with factors of this rank: rows and columns of zeros; itself where it has that rank."""
        from torch.nn.functional import pad

        more = rank - self.rank
        return Factors(pad(self.down, (0, 0, 0, more)), pad(self.up, (0, more))) if more > 0 else self


@final
@dataclass(frozen=True)
class FactorStack:
    """up[e] @ down[e] for each matrix e of a stack (experts), all of one rank.

    Attributes:
        down: shape (experts, r, in).
        up: shape (experts, out, r).
    """

    down: Tensor
    up: Tensor

    @classmethod
    def of(cls, pairs: Sequence[Factors], rank: int = 0) -> FactorStack:
        """Of the factors of each matrix, brought to the highest of their ranks, or to a higher one, by zeros."""
        import torch

        most = max(rank, *(pair.rank for pair in pairs))
        wide = [pair.padded(most) for pair in pairs]
        return cls(torch.stack([pair.down for pair in wide]), torch.stack([pair.up for pair in wide]))

    @property
    def rank(self) -> int:
        """Of each matrix."""
        return int(self.down.shape[1])

    def pairs(self) -> list[Factors]:
        """The factors of each matrix."""
        return [Factors(down, up) for down, up in zip(self.down, self.up, strict=True)]


def of_edits(edit: AddLowRanks) -> list[Factors]:
    """What a low-rank edit of a stack adds to each of its matrices."""
    return [of_edit(edit.entry(index)) for index in range(edit.shape[0])]


def of_edit(edit: AddLowRank) -> Factors:
    """What a low-rank edit adds, as a product of float32 factors; its scale is in `up`."""
    return Factors(edit.down.float(), edit.up.float() * edit.scale)


@final
@dataclass(frozen=True)
class Fit:
    """Factors and how far their product lies from what they stand for.

    Attributes:
        factors: found.
        norm: Frobenius norm of the matrix that they stand for.
        error: Frobenius norm of what is left out.
    """

    factors: Factors
    norm: float
    error: float

    @property
    def share(self) -> float:
        """The error as a share of the norm, 0 where there is nothing."""
        return self.error / self.norm if self.norm else 0.0


def check_size(rank: int | None, energy: float | None) -> None:
    """Refuse a rank or an energy that is none.

    Raises:
        RequestError: naming it.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise RequestError(message("a wrong rank", where="rank", expected="a whole number > 0", found=rank))
    if energy is not None and not 0 < energy <= 1:
        raise RequestError(message("a wrong energy", where="energy", expected="a share above 0, up to 1", found=energy))
    if rank is not None and energy is not None:
        raise RequestError(message("rank and energy exclude each other", where="rank, energy", remedy="Give one."))


def summed(parts: Sequence[tuple[float, Factors]]) -> Factors:
    """sum of weight * up @ down, exactly: the factors side by side, float32; the ranks add up."""
    import torch

    return Factors(
        torch.cat([pair.down.float() for _, pair in parts]),
        torch.cat([weight * pair.up.float() for weight, pair in parts], dim=1),
    )


def turned(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of a product, without ever forming the matrix.

    Returns:
        left, shape (out, k); values, shape (k,), descending; right, shape (k, in); all float64, k the smaller of the
        rank and the matrix's sides.
    """
    import torch

    left, small_left = torch.linalg.qr(factors.up.double())
    right, small_right = torch.linalg.qr(factors.down.double().T)
    inner, values, outer = torch.linalg.svd(small_left @ small_right.T, full_matrices=False)
    return left @ inner, values, outer @ right.T


def reduced(factors: Factors, *, rank: int | None = None, energy: float | None = None) -> Fit:
    """The nearest product of a smaller rank (Eckart and Young, 1936), without ever forming the matrix.

    Args:
        factors: of any rank.
        rank: of the result at most; energy: instead of it, the share of the squared norm to be kept; neither: the
            smallest rank that loses nothing but rounding.
    """
    check_size(rank, energy)
    left, values, right = turned(factors)
    return _fit(left, values, right, _kept(values, rank, energy, max(factors.shape)))


def factored(matrix: Tensor, *, rank: int | None = None, energy: float | None = None) -> Fit:
    """Factors of a matrix of shape (out, in), the nearest of their rank; arguments as for `reduced`."""
    import torch

    check_size(rank, energy)
    small = min(matrix.shape)
    if rank is not None and small >= WIDE and 4 * (rank + MORE) < small:
        return _searched(matrix.float(), rank)
    dense = matrix.double() if matrix.numel() <= EXACT else matrix.float()
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    return _fit(left, values, right, _kept(values, rank, energy, max(matrix.shape)))


def _searched(matrix: Tensor, rank: int) -> Fit:
    """A few leading directions of a large matrix; the error is measured on the matrix itself."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrix, min(rank + MORE, *matrix.shape), niter=ROUNDS)
    found = _fit(left, values, right.T, min(rank, _kept(values, rank, None, max(matrix.shape)))).factors
    rest = torch.addmm(matrix, found.up, found.down, alpha=-1)
    return Fit(found, float(matrix.double().norm()), float(rest.double().norm()))


def unrounded(norm: float, old: float) -> float | None:
    """The energy of a change that is no rounding of the float32 weight that it was read off; None where that is most.

    Args:
        norm: Frobenius norm of the change; old: of the weight.
    """
    share = 2.0**-23 * old / norm if norm else 1.0
    return 1 - share**2 if share < 1e-2 else None


def rank_of(values: Tensor, longest: int) -> int:
    """How many singular values, in descending order, are no rounding; `longest` is the matrix's longer side."""
    import torch

    if values.numel() == 0 or not float(values[0]):
        return 0
    finest = max(torch.finfo(values.dtype).eps, torch.finfo(torch.float32).eps / 16)
    return int((values > values[0] * finest * longest**0.5).sum())


def _kept(values: Tensor, rank: int | None, energy: float | None, longest: int) -> int:
    """How many singular values stay; at least one, because a rank of 0 is no adapter."""
    there = rank_of(values, longest)
    if not there:
        return 1
    if energy is not None and energy < 1:
        squares = values.double().square().cumsum(0)
        there = min(there, int((squares < energy * squares[-1]).sum()) + 1)
    return max(1, there if rank is None else min(rank, there))


def _fit(left: Tensor, values: Tensor, right: Tensor, kept: int) -> Fit:
    """Both factors get the root of the singular values, so that neither is large beside the other."""
    root = values[:kept].sqrt()
    factors = Factors((root[:, None] * right[:kept]).float().contiguous(), (left[:, :kept] * root).float().contiguous())
    return Fit(factors, float(values.double().norm()), float(values[kept:].double().norm()))
