"""Many smooth convex problems minimised at once, by L-BFGS with a diagonal start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

MEMORY: Final = 8  # pairs of steps and gradient differences that each problem keeps
DESCENT: Final = 1e-4  # share of the promised decrease that a step has to bring (Armijo)
SHRINKS: Final = 20  # halvings of a step before a problem counts as done: nothing better can be told in its precision

# Points (problems, size) of the problems of these numbers (problems,) -> values (problems,), gradients like the points.
Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def minimised(
    evaluate: Evaluate, start: Tensor, scale: Tensor, *, tolerance: float = 1e-4, steps: int = 200
) -> tuple[Tensor, Tensor, Tensor]:
    """The minima of independent problems; each stops by itself.

    Args:
        evaluate: values and gradients of some of the problems.
        start: shape (problems, size).
        scale: about the inverse of the Hessian's diagonal, of the same shape: what steps are first measured by.
        tolerance: of what the next step promises to bring, as a share of the value: a problem below it is done.
        steps: at most.

    Returns:
        The points, their values (problems,), and the steps that each problem took (problems,).

    Source: Liu and Nocedal, 1989, algorithm 2.1; the diagonal in place of the scaled identity.
    """
    points = start.clone()
    every = torch.arange(len(points), device=points.device)
    values, gradients = evaluate(points, every)
    taken = torch.zeros(len(points), dtype=torch.long)
    moves: list[Tensor] = []  # each (problems, size); zero where a problem did not move
    changes: list[Tensor] = []
    active = every
    for _ in range(steps):
        slope, direction = _direction(gradients[active], moves, changes, scale[active], active)
        promising = -slope > 2 * tolerance * values[active].abs()
        active, slope, direction = active[promising], slope[promising], direction[promising]
        if not len(active):
            break
        here, value, gradient, moved = _searched(evaluate, points[active], values[active], direction, slope, active)
        move, change = torch.zeros_like(points), torch.zeros_like(points)
        move[active], change[active] = here - points[active], gradient - gradients[active]
        moves, changes = [*moves, move][-MEMORY:], [*changes, change][-MEMORY:]
        points[active], values[active], gradients[active] = here, value, gradient
        taken[active.cpu()] += 1
        active = active[moved]
    return points, values, taken


def _direction(
    gradient: Tensor, moves: list[Tensor], changes: list[Tensor], scale: Tensor, active: Tensor
) -> tuple[Tensor, Tensor]:
    """The two loops of L-BFGS for all active problems: slope (problems,) and direction (problems, size)."""
    found = gradient.clone()
    kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    factor = torch.ones(len(gradient), dtype=gradient.dtype, device=gradient.device)
    for move, change in zip(reversed(moves), reversed(changes), strict=True):
        s, y = move[active], change[active]
        curved = (s * y).sum(1)
        inverse = torch.where(curved > 0, 1 / curved.clamp_min(torch.finfo(s.dtype).tiny), 0.0)
        share = inverse * (s * found).sum(1)
        found -= share[:, None] * y
        if not kept:
            stiff = (y * scale * y).sum(1)
            factor = torch.where((curved > 0) & (stiff > 0), curved / stiff.clamp_min(1e-38), 1.0)
        kept.append((s, y, inverse, share))
    found = found * scale * factor[:, None]
    for s, y, inverse, share in reversed(kept):
        found += (share - inverse * (y * found).sum(1))[:, None] * s
    slope = -(found * gradient).sum(1)
    lost = slope >= 0  # rounding has eaten the curvature: begin again
    found[lost] = gradient[lost] * scale[lost]
    return torch.where(lost, -(found * gradient).sum(1), slope), -found


def _searched(
    evaluate: Evaluate, points: Tensor, values: Tensor, direction: Tensor, slope: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A step of each problem that brings enough; the last tells which moved."""
    here, value, gradient = points.clone(), values.clone(), torch.zeros_like(points)
    moved = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    left = torch.arange(len(points), device=points.device)
    length = torch.ones_like(values)
    slack = 4 * torch.finfo(torch.float32).eps * values.abs()  # losses are summed up in single precision
    for _ in range(SHRINKS):
        tried = points[left] + length[left, None] * direction[left]
        reached, slopes = evaluate(tried, active[left])
        fine = reached <= values[left] + DESCENT * length[left] * slope[left] + slack[left]
        at = left[fine]
        here[at], value[at], gradient[at], moved[at] = tried[fine], reached[fine], slopes[fine], True
        left = left[~fine]
        if not len(left):
            break
        # The minimum of the parabola through value, slope and the point that was tried, within a half and a tenth.
        failed = reached[~fine]
        bent = 2 * (failed - values[left] - length[left] * slope[left])
        guess = torch.where(bent > 0, -slope[left] * length[left] ** 2 / bent, length[left] / 2)
        length[left] = torch.nan_to_num(guess, nan=0.0).clamp(length[left] / 10, length[left] / 2)
    return here, value, gradient, moved
