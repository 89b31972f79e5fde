"""Output layers solved: at the minimum that others find, for every loss of a task, and chosen on other rows."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional

from adapters import features, pooling, principal, solve
from adapters.anatomy import block_lists
from adapters.classes import Classes
from adapters.lbfgs import minimised
from adapters.prefix import Cut, Prefix
from adapters.reading import OWN, Reading


def items(labels: Tensor) -> int:
    return labels.numel()


def data(classes: int = 4, count: int = 160, width: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of very different spreads, correlated, shifted; and classes that overlap."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=draw)
    plain = torch.randn(count, width, generator=draw) + 0.7 * centres[labels]
    mixed = plain @ torch.randn(width, width, generator=draw)
    return mixed * torch.logspace(-2, 2, width) + 3, labels


def standardised(features: Tensor) -> Any:
    return ((features - features.mean(0)) / features.std(0, unbiased=False)).double().numpy()


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_the_solution_is_scikit_learns(classes: int, penalty: float) -> None:
    from sklearn.linear_model import LogisticRegression

    found, labels = data(classes)
    task = Classes(tuple("abcdefgh"[:classes]))
    layer = solve.probes(
        [found.double()], labels, task.loss, classes, [penalty], dtype=torch.float64, tolerance=1e-9, steps=500
    )[0][0]
    plain = standardised(found)
    # A multinomial of two classes penalises both rows of weights, scikit-learn's binary one their difference.
    strength = 1 / (penalty * len(labels)) * (2 if classes == 2 else 1)
    known = LogisticRegression(C=strength, tol=1e-10, max_iter=5000).fit(plain, labels.numpy())
    wanted = torch.as_tensor(known.predict_log_proba(plain))
    torch.testing.assert_close(layer.logits(found.double()).log_softmax(-1), wanted, rtol=2e-3, atol=2e-3)


def test_regression_is_ridges_closed_form() -> None:
    found, _ = data()
    draw = torch.Generator().manual_seed(1)
    truth = torch.randn(len(found), generator=draw)
    task, penalty = Classes(problem="regression"), 1e-2
    layer = solve.probes([found], truth, task.loss, 1, [penalty], dtype=torch.float64, tolerance=1e-10, steps=500)[0][0]
    plain = torch.as_tensor(standardised(found))
    bend = 2 * plain.T @ plain / len(plain) + penalty * torch.eye(plain.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(bend, 2 * plain.T @ (truth - truth.mean()).double() / len(plain))
    wanted = plain @ weight + truth.double().mean()
    torch.testing.assert_close(layer.logits(found.double())[:, 0], wanted, rtol=1e-3, atol=1e-3)


TASKS = {
    "plain": Classes(("a", "b", "c")),
    "smoothed": Classes(("a", "b", "c"), label_smoothing=0.2),
    "weighted": Classes(("a", "b", "c"), class_weights={"a": 3.0, "b": 1.0, "c": 0.1}),
    "several labels": Classes(("a", "b", "c"), problem="multi-label", label_smoothing=0.1),
    "a number": Classes(problem="regression"),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", TASKS)
def test_the_gradient_of_the_tasks_own_loss_vanishes(name: str, bias: bool) -> None:
    """Without the penalty's help: the layer is put through the loss as training would put it."""
    task, penalty = TASKS[name], 1e-2
    found, numbers = data(3, 90, 6)
    labels = {
        "several labels": torch.stack([(numbers == n).float() for n in range(3)], 1),
        "a number": numbers.float(),
    }.get(name, numbers)
    outputs = 1 if name == "a number" else 3
    layer = solve.probes(
        [found], labels, task.loss, outputs, [penalty], items=labels.numel(), bias=bias, tolerance=1e-8, steps=500
    )[0][0]
    scale = 1 / found.std(0, unbiased=False) if bias else 1 / found.square().mean(0).sqrt()
    weight = (layer.weight / scale).detach().requires_grad_()
    shift = layer.bias.detach().clone().requires_grad_()
    plain = found * scale
    loss = task.loss(plain @ weight.T + shift, labels, labels.numel()) + penalty / 2 * weight.square().sum()
    pulls = torch.autograd.grad(loss, [weight, shift])
    assert float(pulls[0].abs().max()) < 2e-3
    if bias:
        assert float(pulls[1].abs().max()) < 2e-3
    else:
        assert not layer.bias.any()


def test_many_at_once_are_each_alone() -> None:
    """Every set of features and every penalty, of other widths too."""
    one, labels = data(3, 90, 6)
    two = torch.cat([one.flip(1), one.square()], 1)
    task = Classes(("a", "b", "c"))
    how: dict[str, Any] = {"dtype": torch.float64, "tolerance": 1e-9, "steps": 400}
    together = solve.probes([one, two], labels, task.loss, 3, [1e-1, 1e-2], **how)
    for features_, layers in zip((one, two), together, strict=True):
        for penalty, layer in zip((1e-1, 1e-2), layers, strict=True):
            alone = solve.probes([features_], labels, task.loss, 3, [penalty], **how)[0][0]
            assert layer.penalty == penalty
            wide = features_.double()
            torch.testing.assert_close(layer.logits(wide), alone.logits(wide), rtol=1e-3, atol=1e-3)


def test_features_that_never_vary_weigh_nothing() -> None:
    found, labels = data(3, 90, 6)
    found[:, 2] = 7.0
    layer = solve.probes([found], labels, Classes(("a", "b", "c")).loss, 3, [1e-3])[0][0]
    assert torch.equal(layer.weight[:, 2], torch.zeros(3))
    assert bool(torch.isfinite(layer.weight).all())


def test_minima_of_many_quadratics() -> None:
    """Each problem stops by itself, and one that begins at its minimum stays there."""
    draw = torch.Generator().manual_seed(0)
    bends = [torch.diag(torch.logspace(0, power, 5)) for power in (0, 2, 4)]
    aims = torch.randn(3, 5, generator=draw)
    seen: list[int] = []

    def evaluate(points: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        seen.extend(which.tolist())
        away = points - aims[which]
        pulls = torch.stack([bends[number] @ row for number, row in zip(which.tolist(), away, strict=True)])
        return 0.5 * (away * pulls).sum(1) + 1, pulls

    start = torch.zeros(3, 5)
    start[0] = aims[0]
    points, values, taken = minimised(evaluate, start, torch.ones(3, 5), tolerance=1e-9, steps=300)
    torch.testing.assert_close(points, aims, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(values, torch.ones(3), rtol=1e-4, atol=1e-4)
    assert taken.tolist()[0] == 0
    assert seen.count(0) < seen.count(2)


def test_the_informative_place_is_chosen_on_other_rows() -> None:
    """Of eight candidates one tells the classes; one tells those of the training rows alone."""
    train, labels = data(3, 120, 6)
    held, truth = data(3, 120, 6)
    draw = torch.Generator().manual_seed(3)
    noise, other = torch.randn(120, 8, 6, generator=draw), torch.randn(120, 8, 6, generator=draw)
    noise[:, 5] = train
    other[:, 5] = held + 0.05 * torch.randn(120, 6, generator=draw)
    noise[:, 2] = torch.nn.functional.one_hot(labels, 6) + 0.01 * noise[:, 2]
    task = Classes(("a", "b", "c"))
    found = solve.chosen(noise, labels, task.loss, 3, items=items, held=(other, truth))
    assert found.place == 5
    assert found.tried[0].loss < found.blind
    assert {one.place for one in found.tried} >= {0, 5}
    assert found.items == 120


def test_what_hangs_on_features_alone_is_made_once_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    train, other = (torch.randn(90, 7, 6, generator=generator) for _ in range(2))
    labels, truth = (torch.randint(0, 3, (90,), generator=generator) for _ in range(2))
    turns, initial = principal.Turns(train), principal.Turned.__init__
    made: list[Any] = []
    monkeypatch.setattr(
        principal.Turned,
        "__init__",
        lambda self, *args, **how: made.append(how) or initial(self, *args, **how),  # type: ignore[func-returns-value]
    )

    def chosen(smoothing: float, known: principal.Turns | None) -> solve.Choice:
        def loss(logits: torch.Tensor, targets: torch.Tensor, items: int) -> torch.Tensor:
            return functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing) / items

        return solve.chosen(train, labels, loss, 3, items=items, held=(other, truth), turns=known)

    for smoothing in (0.0, 0.1):
        alone = chosen(smoothing, None)
        made.clear()
        shared = chosen(smoothing, turns)
        assert shared.tried == alone.tried
        assert torch.equal(shared.layer.weight, alone.layer.weight)
        assert torch.equal(shared.layer.bias, alone.layer.bias)
    before = len(made)
    assert before <= 1 + 7, "the answer without a look at the input, and places that were not solved yet"
    chosen(0.1, principal.Turns(train))
    assert len(made) > before + 7
    other_rows = chosen(0.1, principal.Turns(train.flip(0)))  # of other rows: not taken
    assert other_rows.tried == alone.tried


@pytest.mark.parametrize("classes", [2, 5])
def test_a_softened_layer_gives_the_same_answers_at_the_loss_that_is_asked_for(classes: int) -> None:
    found, labels = data(classes)
    loss = Classes(tuple("abcdefgh"[:classes])).loss
    layer = solve.probes([found], labels, loss, classes, [1e-3])[0][0]
    logits = layer.logits(found)
    least, blind = float(loss(logits, labels, len(labels))), float(torch.tensor(classes).log())
    for goal in (least + 0.1 * (blind - least), 0.5 * blind, 0.99 * blind):
        share = solve.softened(layer, found, labels, loss, len(labels), goal)
        assert 0 < share < 1
        assert float(loss(logits * share, labels, len(labels))) == pytest.approx(goal, rel=1e-3)
        assert torch.equal((logits * share).argmax(-1), logits.argmax(-1))
    for goal in (0.0, least):  # it is there already
        assert solve.softened(layer, found, labels, loss, len(labels), goal) == 1


def test_without_other_rows_parts_choose_and_all_are_fitted() -> None:
    train, labels = data(3, 120, 6)
    task = Classes(("a", "b", "c"))
    found = solve.chosen(train[:, None], labels, task.loss, 3, items=items, penalties=(1e-1, 1e-2, 1e-3))
    again = solve.chosen(train[:, None], labels, task.loss, 3, items=items, penalties=(1e-1, 1e-2, 1e-3))
    assert torch.equal(found.layer.weight, again.layer.weight)
    whole = solve.probes([train], labels, task.loss, 3, [found.layer.penalty])[0][0]
    torch.testing.assert_close(found.layer.logits(train), whole.logits(train))


# ---------------------------------------------------------------------- features


def batch_of(model: Any) -> dict[str, Any]:
    made = tiny.inputs(model)
    return {name: value for name, value in made.items() if name != "labels"}


KINDS = [
    kind for kind in tiny.FAMILIES if {tiny.CLASSIFICATION, "AutoModelForImageClassification"} & {*tiny.heads(kind)}
]


def classifier(kind: str) -> Any:
    auto = next(a for a in tiny.heads(kind) if a in (tiny.CLASSIFICATION, "AutoModelForImageClassification"))
    model = tiny.model(kind, auto=auto)
    if model.main_input_name != "pixel_values":
        model.config.pad_token_id = model.config.pad_token_id or 0
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_own_features_make_the_logits(kind: str) -> None:
    """What enters the output layer, whatever the class has before it."""
    model = classifier(kind)
    inputs = batch_of(model)
    layer = features.output_layer(model, inputs)
    assert layer is not None
    found = features.Extract(model, layer, (Reading(),)).batch(inputs)
    torch.testing.assert_close(layer(found[:, 0]), model(**inputs).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2", "modernbert", "gpt2", "llama", "vit", "electra"])
def test_features_are_what_the_placed_head_reads(kind: str) -> None:
    """Every pooling and layer, against a model whose head was put there."""
    model = classifier(kind)
    inputs = batch_of(model)
    layer = features.output_layer(model, inputs)
    assert layer is not None
    depth = block_lists(model)[-1].length
    poolings = (OWN, "first", "mean") if kind == "vit" else (OWN, "first", "mean", "last")
    readings = tuple(Reading(name, at) for at in (None, *range(1, depth)) for name in poolings)
    found = features.Extract(model, layer, readings).batch(inputs)
    for number, reading in enumerate(readings):
        pooling.place(model, reading.pooling, reading.layer)
        with torch.no_grad():
            wanted = model(**inputs).logits
        made = torch.nn.Linear.forward(layer, found[:, number])
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5, msg=str(reading))
    pooling.strip(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_features_of_labelled_tokens_and_of_kept_rows() -> None:
    """A head over tokens gives an item for each labelled place; a second look computes nothing."""
    model = tiny.model("bert", auto="AutoModelForTokenClassification").eval()
    inputs = batch_of(model)
    labels = torch.full(inputs["input_ids"].shape, features.IGNORED)
    labels[:, 1:4] = 1
    layer = features.output_layer(model, inputs)
    assert layer is not None
    extract = features.Extract(model, layer, (Reading(), Reading(OWN, 1)))
    kept: dict[bytes, Tensor] = {}

    class Kept:
        get = staticmethod(kept.get)
        add = staticmethod(kept.__setitem__)

    keys = Prefix(model, Cut("", layer, ())).keys
    found, targets = features.of_rows(extract, [{**inputs, "labels": labels}], Kept, keys)
    assert found.shape == (15, 2, 32)
    assert targets.tolist() == [1] * 15
    torch.testing.assert_close(layer(found[:3, 0]), model(**inputs).logits[0, 1:4], rtol=1e-4, atol=1e-5)
    calls: list[int] = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    again, _ = features.of_rows(extract, [{**inputs, "labels": labels}], Kept, keys)
    hook.remove()
    assert torch.equal(found, again)
    assert not calls
