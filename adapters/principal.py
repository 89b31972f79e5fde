"""Features standardised and turned into their principal directions, in which losses over them bend about diagonally."""

from __future__ import annotations

import functools
from typing import Final, final

import torch
from torch import Tensor

FLAT: Final = 1e-6  # spread of a feature, as a share of the largest, below which it is left out
WIDE: Final = 2048  # features above which directions are not turned
FEW: Final = 4  # times as many rows as features, from which what is made of them is held


@final
class Turned:
    """Standardised features in their principal directions, and the way back.

    Those that are not turned are standardised each time that they are asked for: no second copy of them is held.
    """

    def __init__(
        self, features: Tensor, dtype: torch.dtype, *, centred: bool, even: bool = False, turned: bool = True
    ) -> None:
        self.mean = features.mean(0, dtype=torch.float64)
        if not centred:  # there is no bias to take the shift
            self.mean = torch.zeros_like(self.mean)
        shifted = features.to(dtype) - self.mean.to(dtype)
        spread = shifted.square().mean(0, dtype=torch.float64).sqrt()
        self.scale = torch.where(spread > FLAT * spread.max(), 1 / spread.clamp_min(1e-30), 0.0).to(dtype)
        if even:
            whole = features.square().mean(dtype=torch.float64).sqrt().clamp_min(1e-30)
            self.scale = torch.full_like(self.scale, 1 / float(whole))
        self._features, self._inputs = features, shifted.mul_(self.scale) if turned else None
        self.turn: Tensor | None = None
        self.dtype, self.width = dtype, features.shape[1]
        self.curvature = torch.ones(self.width, dtype=dtype, device=features.device)
        self.wide = self.width > WIDE
        if self._inputs is not None and not self.wide:
            curvature, turn = torch.linalg.eigh(self._inputs.T @ self._inputs / len(self._inputs))
            self.curvature, self.turn = curvature.clamp_min(0), turn
            self._inputs = self._inputs @ turn

    @property
    def inputs(self) -> Tensor:
        """The features, standardised, and turned where that was asked for: (items, width)."""
        if self._inputs is not None:
            return self._inputs
        return (self._features.to(self.dtype) - self.mean.to(self.dtype)).mul_(self.scale)

    @functools.cached_property
    def gram(self) -> Tensor:
        """The mean of the features' outer products (width, width)."""
        inputs = self.inputs
        return inputs.T @ inputs / len(inputs)

    def layer(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (outputs, width) and bias for plain features."""
        if self.turn is not None:
            weight = weight @ self.turn.T
        weight = weight * self.scale
        return weight, bias - weight @ self.mean.to(weight.dtype)


@final
class Turns:
    """Features by the place that they were read at, standardised and turned once for all that is solved on them.

    Args:
        features: of the rows that are fitted, shape (items, places, width).
        keeps: what is made of a place is held, where its outer products take little beside its rows; else nothing is.
    """

    def __init__(self, features: Tensor, *, keeps: bool = True) -> None:
        self.features, self.keeps = features, keeps and FEW * features.shape[-1] <= len(features)
        self._made: dict[tuple[int, bool, bool, bool], Turned] = {}

    def at(self, place: int, *, centred: bool, even: bool = False, turned: bool = True) -> Turned:
        """Those of a place, in float32."""
        how = place, centred, even, turned
        found = self._made.get(how)
        if found is None:
            features = self.features[:, place]
            found = Turned(features, torch.float32, centred=centred, even=even, turned=turned)
            if self.keeps:
                self._made[how] = found
        return found
