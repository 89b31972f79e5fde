"""Output layers solved, not stepped: the minimum of a task's loss over features that do not change.

Features are standardised and turned into their principal directions, in which the curvature of the loss is about
diagonal: a few tens of steps reach the minimum. Scale, shift and turn are folded back into weight and bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from adapters import progress
from adapters.lbfgs import minimised
from adapters.principal import Turned, Turns

# L2 penalties on standardised features, beside a loss that is a mean over items: half the penalty times |W|^2.
PENALTIES: Final = (1.0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)
SCREEN: Final = (1e-2, 1e-3)  # penalties at which many candidates are compared first, roughly
SCALES: Final = (1.0, 2.0, 4.0, 8.0, 16.0)  # of that first answer: one step from zero stops short of the minimum
KEPT: Final = 4  # candidates that are then solved
WORSE: Final = 1.3  # times the best loss at the same penalty at which a candidate is given up
FOLDS: Final = 3  # of the rows, where there are no others to choose by
ENOUGH: Final = 2_000  # items from which one part in five is held back instead
# Logits (items, outputs), labels, items -> the loss, a sum divided by the items.
Loss = Callable[[Tensor, Tensor, int], Tensor]


@final
@dataclass(frozen=True)
class Solved:
    """One output layer at the minimum of its problem.

    Attributes:
        weight: shape (outputs, width), for features as they come out of the backbone.
        bias: shape (outputs,).
        penalty: the L2 penalty.
    """

    weight: Tensor
    bias: Tensor
    penalty: float

    def logits(self, features: Tensor) -> Tensor:
        """What the layer answers: features (items, width) -> (items, outputs)."""
        return features.to(self.weight.dtype) @ self.weight.T + self.bias


def probes(
    sets: Sequence[Tensor],
    labels: Tensor,
    loss: Loss,
    outputs: int,
    penalties: Sequence[float] = PENALTIES,
    *,
    items: int | None = None,
    bias: bool = True,
    even: bool = False,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-3,
    steps: int = 100,
) -> list[list[Solved]]:
    """Every set of features at every penalty, all minimised together.

    Args:
        sets: features, each (items, width); the widths may differ.
        labels: what the loss compares with, items first.
        loss: convex in the logits.
        outputs: of the layer.
        penalties: L2 penalties on the weights of features with a spread of 1; the bias has none.
        items: what the loss is divided by; None for the number of rows of `labels`.
        bias: whether the layer has one; without it features keep their mean.
        even: penalties are on weights of features divided by their common root mean square, instead of each by its
            own spread: no small difference between large numbers is blown up.
        dtype: in which it is solved.
        tolerance: of what a further step would bring, as a share of the loss.
        steps: at most.

    Returns:
        For each set the layers, in the order of the penalties.
    """
    fit = _Fit([Turned(one, dtype, centred=bias, even=even) for one in sets], labels, loss, outputs, items, bias=bias)
    places = [(number, penalty) for number in range(len(sets)) for penalty in penalties]
    points = fit.minima(places, tolerance=tolerance, steps=steps)
    found = [fit.layer(place, point) for place, point in zip(places, points, strict=True)]
    share = len(penalties)
    return [found[number * share : (number + 1) * share] for number in range(len(sets))]


@final
class _Fit:
    """Problems over some sets of features and one column of labels.

    Args:
        sets: the features.
        labels, loss, outputs, items, bias: as `probes` takes them.
        like: another fit of the same labels by the same loss, for what hangs on these alone.
    """

    def __init__(
        self,
        sets: Sequence[Turned],
        labels: Tensor,
        loss: Loss,
        outputs: int,
        items: int | None,
        *,
        bias: bool,
        like: _Fit | None = None,
    ) -> None:
        self.sets, self.labels, self.loss, self.outputs, self.bias = sets, labels, loss, outputs, bias
        self.items = items if items is not None else len(labels)
        self.width = max(one.width for one in sets)
        self.dtype = sets[0].dtype
        self.curve: float = like.curve if like else _curvature(loss, labels, outputs, self.items, self.dtype)
        self._pulls_at_zero: Tensor | None = like._pulls_at_zero if like else None

    def minima(
        self,
        places: Sequence[tuple[int, float]],
        starts: Tensor | None = None,
        *,
        tolerance: float = 1e-3,
        steps: int = 100,
    ) -> Tensor:
        """The minima (problems, outputs, width + 1) of problems: the number of a set, and a penalty."""
        owners = [number for number, _ in places]
        penalty = torch.tensor([penalty for _, penalty in places], dtype=self.dtype, device=self.labels.device)
        scale = torch.zeros(len(places), self.outputs, self.width + 1, dtype=self.dtype, device=self.labels.device)
        for number, (owner, strength) in enumerate(places):
            one = self.sets[owner]
            scale[number, :, : one.width] = 1 / (self.curve * one.curvature + strength).clamp_min(1e-12)
            scale[number, :, -1] = 1 / self.curve

        def evaluate(points: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
            return self._values(points, [owners[index] for index in which.tolist()], penalty[which])

        start = torch.zeros_like(scale) if starts is None else starts
        size = self.outputs * (self.width + 1)
        points, _, _ = minimised(
            evaluate, start.reshape(-1, size), scale.view(-1, size), tolerance=tolerance, steps=steps
        )
        return points.view(-1, self.outputs, self.width + 1)

    def _values(self, points: Tensor, owners: Sequence[int], penalty: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.empty(len(owners), dtype=self.dtype, device=points.device)
        gradients = torch.zeros_like(points)
        held = points.view(-1, self.outputs, self.width + 1)
        slopes = gradients.view(-1, self.outputs, self.width + 1)
        for number in sorted(set(owners)):
            mine = [place for place, owner in enumerate(owners) if owner == number]
            inputs, wide = self.sets[number].inputs, self.sets[number].width
            logits = torch.matmul(inputs, held[mine, :, :wide].transpose(1, 2)) + held[mine, :, -1][:, None]
            found, pulls = _pulls(self.loss, logits, self.labels, self.items)
            values[mine] = found.to(self.dtype)
            pulls = pulls.to(self.dtype)
            slopes[mine, :, :wide] = torch.matmul(pulls.transpose(1, 2), inputs)
            if self.bias:
                slopes[mine, :, -1] = pulls.sum(1)
        weights = held[:, :, :-1]
        values += 0.5 * penalty * weights.square().sum((1, 2))
        slopes[:, :, :-1] += penalty[:, None, None] * weights
        return values, gradients

    def layer(self, place: tuple[int, float], point: Tensor) -> Solved:
        """A point (outputs, width + 1) as a layer for plain features."""
        one = self.sets[place[0]]
        weight, shift = one.layer(point[:, : one.width], point[:, -1])
        return Solved(weight, shift, place[1])

    def first(self, number: int, penalties: Sequence[float]) -> list[Tensor]:
        """One step of Newton's method from zero for each penalty, the Hessian taken as equal for all outputs.

        Returns:
            Points (outputs, width + 1).
        """
        one = self.sets[number]
        if self._pulls_at_zero is None:
            zero = torch.zeros(1, len(self.labels), self.outputs, dtype=self.dtype, device=self.labels.device)
            self._pulls_at_zero = _pulls(self.loss, zero, self.labels, self.items)[1][0].to(self.dtype)
        pulls = self._pulls_at_zero
        bend = self.curve * (torch.diag(one.curvature) if one.turn is not None or one.wide else one.gram)
        slope, unit = one.inputs.T @ pulls, torch.eye(len(bend), dtype=self.dtype, device=bend.device)
        shift = -pulls.sum(0)[:, None] / self.curve * self.bias
        return [torch.cat([-torch.linalg.solve(bend + each * unit, slope).T, shift], dim=1) for each in penalties]


def _pulls(loss: Loss, logits: Tensor, labels: Tensor, items: int) -> tuple[Tensor, Tensor]:
    """The loss of each problem (problems,), and its gradient by the logits (problems, items, outputs)."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        values = torch.stack([loss(each, labels, items) for each in leaf])
        (pulls,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), pulls


def _curvature(loss: Loss, labels: Tensor, outputs: int, items: int, dtype: torch.dtype) -> float:
    """About how much the loss bends along one output, at zero: from two gradients."""
    zero = torch.zeros(1, len(labels), outputs, dtype=dtype, device=labels.device)
    generator = torch.Generator().manual_seed(0)
    away = 0.1 * torch.randn(zero.shape, generator=generator).to(zero)
    change = _pulls(loss, away, labels, items)[1] - _pulls(loss, zero, labels, items)[1]
    return max(float((change.double() * away).sum() / away.double().square().sum()) * len(labels), 1e-8)


# ---------------------------------------------------------------------- chosen on rows that it was not fitted to


@final
@dataclass(frozen=True)
class Tried:
    """What a candidate came to on the rows that choose.

    Attributes:
        place: its number.
        penalty: its L2 penalty.
        loss: the task's mean loss.
        score: the share of right answers where labels are class numbers, else minus the loss.
    """

    place: int
    penalty: float
    loss: float
    score: float


@final
@dataclass(frozen=True)
class Choice:
    """The best of many candidates.

    Attributes:
        place: its number among the candidates.
        layer: the solved output layer.
        tried: the best of every candidate that was solved at all penalties, the best first.
        blind: the loss of the best answer that never looks at the input, on the rows that chose.
        counted: classes are right or wrong, so scores are shares of right answers.
        items: that chose.
        train_loss: of the layer on all training rows, without the penalty.
    """

    place: int
    layer: Solved
    tried: tuple[Tried, ...]
    blind: float
    counted: bool
    items: int
    train_loss: float


def chosen(
    train: Tensor,
    labels: Tensor,
    loss: Loss,
    outputs: int,
    *,
    items: Callable[[Tensor], int],
    held: tuple[Tensor, Tensor] | None = None,
    bias: bool = True,
    even: bool = False,
    seed: int = 0,
    penalties: Sequence[float] = PENALTIES,
    turns: Turns | None = None,
) -> Choice:
    """The place to read and the penalty with the smallest loss on other rows.

    Where many places are candidates, all are solved roughly at first, and the best few are solved at every penalty.

    Args:
        train: features, shape (items, candidates, width).
        labels: items first.
        loss: convex in the logits.
        outputs: of the layer.
        items: how many the loss of some labels is divided by.
        held: features and labels that choose; None for parts of the training rows, after which all are fitted.
        bias, even: as `probes` takes them.
        seed: of the parts.
        penalties: to choose among.
        turns: of these training features, from what was solved on them before by another loss.
    """
    parts = _parts(train, labels, held, seed)
    turned = [turns if turns is not None and fit is turns.features else Turns(fit, keeps=False) for fit, *_ in parts]
    total = sum(items(part[3]) for part in parts)
    places = list(range(train.shape[1]))
    if len(places) > KEPT:
        places = _screened(places, parts[0], turned[0], loss, outputs, items, bias=bias)
    tried: dict[tuple[int, float], Tried] = {}
    layers: dict[tuple[int, float], Solved] = {}
    fits = [
        _Fit(
            [own.at(place, centred=bias, even=even) for place in places],
            fit_labels,
            loss,
            outputs,
            items(fit_labels),
            bias=bias,
        )
        for own, (_, fit_labels, _, _) in zip(turned, parts, strict=True)
    ]
    going = list(range(len(places)))
    starts: list[Tensor | None] = [None] * len(fits)
    for penalty in sorted(penalties, reverse=True):
        problems = [(number, penalty) for number in going]
        sums = torch.zeros(len(going), 2, dtype=torch.float64)
        for turn, (fit, (_, _, other, other_labels)) in enumerate(zip(fits, parts, strict=True)):
            points = fit.minima(problems, starts[turn])
            starts[turn] = points
            weight = items(other_labels)
            for row, (problem, point) in enumerate(zip(problems, points, strict=True)):
                place = places[problem[0]]
                layers[place, penalty] = found = fit.layer(problem, point)
                logits = found.logits(other[:, place])
                here = float(loss(logits, other_labels, weight))
                sums[row] += torch.tensor([here, _right(logits, other_labels, here)]) * weight / total
        for number, (mean, score) in zip(going, sums.tolist(), strict=True):
            tried[places[number], penalty] = Tried(places[number], penalty, mean, score)
        best = min(one.loss for one in tried.values() if one.penalty == penalty)
        stay = [
            row
            for row, number in enumerate(going)
            if (here := tried[places[number], penalty].loss) <= WORSE * best
            and here <= min(one.loss for one in tried.values() if one.place == places[number]) * (1 + 1e-3)
        ]
        progress.count()
        if not stay:
            break
        going = [going[row] for row in stay]
        starts = [points[stay] if points is not None else None for points in starts]
    chosen_one = min(tried.values(), key=lambda one: one.loss)
    layer = layers[chosen_one.place, chosen_one.penalty]
    if held is None:
        sets = [train[:, chosen_one.place]]
        layer = probes(sets, labels, loss, outputs, [chosen_one.penalty], items=items(labels), bias=bias, even=even)[0][
            0
        ]
    shown = [min((t for t in tried.values() if t.place == place), key=lambda one: one.loss) for place in places]
    return Choice(
        chosen_one.place,
        layer,
        tuple(sorted(shown, key=lambda one: one.loss)),
        _blind(parts, loss, outputs, items),
        not labels.is_floating_point(),
        total,
        float(loss(layer.logits(train[:, chosen_one.place]), labels, items(labels))),
    )


def softened(layer: Solved, features: Tensor, labels: Tensor, loss: Loss, items: int, goal: float) -> float:
    """The factor, at most 1, on a layer's weights and bias with which its loss on these rows is `goal`.

    The answers stay the same, for the logits of a row keep their order; they are only less sure. 1 where the loss is
    not below `goal` to begin with.

    Args:
        layer: solved.
        features: shape (items, width).
        labels, loss, items: as `probes` takes them.
        goal: below the loss of equal logits.
    """
    logits = layer.logits(features)
    low, high = 0.0, 1.0
    if float(loss(logits, labels, items)) >= goal:
        return high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if float(loss(logits * middle, labels, items)) > goal else (low, middle)
    return high


def _screened(
    places: Sequence[int],
    part: tuple[Tensor, Tensor, Tensor, Tensor],
    turns: Turns,
    loss: Loss,
    outputs: int,
    items: Callable[[Tensor], int],
    *,
    bias: bool,
) -> list[int]:
    """The places worth to be solved: the first, and the best by one step of Newton's method, scaled."""
    best = dict.fromkeys(places, float("inf"))
    _, fit_labels, other, other_labels = part
    rough: _Fit | None = None
    for place in places:
        plain = turns.at(place, centred=bias, turned=False)
        rough = _Fit([plain], fit_labels, loss, outputs, items(fit_labels), bias=bias, like=rough)
        for penalty, point in zip(SCREEN, rough.first(0, SCREEN), strict=True):
            logits = rough.layer((0, penalty), point).logits(other[:, place])
            found = [float(loss(logits * scale, other_labels, items(other_labels))) for scale in SCALES]
            best[place] = min(best[place], *found)
    return sorted({places[0], *sorted(places, key=lambda place: best[place])[:KEPT]})


def _parts(
    train: Tensor, labels: Tensor, held: tuple[Tensor, Tensor] | None, seed: int
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """What is fitted and what chooses: features and labels of both, once or for each fold."""
    if held is not None:
        return [(train, labels, *held)]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if not labels.is_floating_point():  # each class in proportion
        order = order[torch.sort(labels[order], stable=True).indices]
    folds = torch.empty(len(labels), dtype=torch.long)
    folds[order] = torch.arange(len(labels)) % (5 if len(labels) >= ENOUGH else FOLDS)
    count = 1 if len(labels) >= ENOUGH else FOLDS
    return [
        (train[folds != fold], labels[folds != fold], train[folds == fold], labels[folds == fold])
        for fold in range(count)
    ]


def _right(logits: Tensor, labels: Tensor, loss: float) -> float:
    return -loss if labels.is_floating_point() else float((logits.argmax(-1) == labels).float().mean())


def _blind(
    parts: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], loss: Loss, outputs: int, items: Callable[[Tensor], int]
) -> float:
    """The loss of the best constant answer, on the rows that choose."""
    total, count = 0.0, 0
    for _, fit_labels, _, other_labels in parts:
        nothing = torch.zeros(len(fit_labels), 1)
        constant = probes([nothing], fit_labels, loss, outputs, [1e-6], items=items(fit_labels))[0][0]
        weight = items(other_labels)
        total += float(loss(constant.logits(torch.zeros(len(other_labels), 1)), other_labels, weight)) * weight
        count += weight
    return total / max(count, 1)
