"""Adapters put together: laws over methods and strategies, references for the arithmetic, and what is refused."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import adapters
from adapters import arithmetic, changes, exactness, manifest, mixture, reference, shards, weighing
from adapters.arithmetic import METHODS, Term
from adapters.inspection import describe, lines

BIASED = {"config": {"peft_type": "LORA", "r": 3, "lora_bias": True, "target_modules": ["query", "value"]}}
PATTERNS = {"r": 2, "rank_pattern": {".*(query|q_proj)": 5}, "alpha_pattern": {".*(query|q_proj)": 7.0}}
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3},
    "rslora": {"r": 3},
    "dora": {"r": 2},
    "freeze": {"layers": 1},
    "oft": {"oft_block_size": 8},
    "lora_bias": BIASED,
    "patterns": PATTERNS,
}
ROWS = {"lora_bias": "peft", "patterns": "lora"}
PAIRS = [
    ("bert", "lora", "rslora"),
    ("bert", "rslora", "patterns"),
    ("bert", "dora", "lora"),
    ("bert", "lora_bias", "rslora"),
    ("bert", "bitfit", "freeze"),
    ("bert", "full", "lora"),
    ("bert", "oft", "ia3"),
    ("gpt2", "rslora", "dora"),
    ("gpt2", "full", "freeze"),
    ("llama", "patterns", "lora"),
    ("llama", "freeze", "dora"),
    ("vit", "rslora", "bitfit"),
    ("vit", "full", "lora"),
    ("t5", "lora", "rslora"),
]
ALL = sorted({(kind, strategy) for kind, *both in PAIRS for strategy in both})
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("combine")


@pytest.fixture(scope="module")
def make(place: Path) -> Make:
    """Adapters that do something, on backbones on disk, each made once."""
    known: dict[Any, Path] = {}

    def made(kind: str, strategy: str, seed: int = 1, **options: Any) -> Path:
        base = place / kind
        if not base.exists():
            tiny.folder(kind, base)
        key = (kind, strategy, seed, json.dumps(options))
        if key not in known:
            adapted = adapters.adapt(
                str(base),
                ROWS.get(strategy, strategy),
                task="image-classification" if kind in tiny.IMAGES else "text-classification",
                labels=list(tiny.LABELS),
                **OPTIONS.get(strategy, {}) | options,
            )
            tiny.shake(adapted, seed=seed)
            known[key] = adapters.save(adapted, place / f"{kind}-{strategy}-{len(known)}")
        return known[key]

    return made


def live(folder: Path) -> Any:
    return adapters.load(folder).model


def summed(base: Path, folders: dict[Path, float], head: Path) -> Any:
    """The reference: the backbone plus weighted differences of merged models, all of it in float64."""
    import transformers

    like = adapters.merge(adapters.load(head)).double()
    with torch.random.fork_rng(devices=[]):
        bare = type(like).from_pretrained(base, config=copy.deepcopy(like.config), dtype=torch.float32)
    assert isinstance(bare, transformers.PreTrainedModel)
    old = {name: tensor.double() for name, tensor in bare.state_dict().items()}
    own = manifest.read_manifest(head)["head"]
    total = {name: tensor.clone() for name, tensor in old.items()}
    for folder, weight in folders.items():
        state = adapters.merge(adapters.load(folder)).state_dict()
        for name in total:
            if name not in own:
                total[name] += weight * (state[name].double() - old[name])
    total |= {name: like.state_dict()[name].double() for name in own}
    like.load_state_dict(total)
    return like


def close(model: Any, reference: Any, within: float = 1e-5) -> None:
    inputs = tiny.inputs(model)
    exact = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    expected = tiny.logits(reference, exact if next(reference.parameters()).dtype == torch.float64 else inputs)
    torch.testing.assert_close(tiny.logits(model, inputs).double(), expected.double(), atol=within, rtol=within)


def proven(report: adapters.CombineReport, against: str) -> None:
    """A merged model that was read back answers as it must."""
    assert report.form == "merged"
    assert report.logits_checked
    assert report.skipped == ""
    assert against in report.against
    assert report.max_difference is not None
    assert report.spread is not None
    assert report.max_difference <= 1e-5 * report.spread
    assert report.agreement == 1.0
    assert not report.accepted


# ---------------------------------------------------------------------- laws


METHOD = ["linear", "cat", "ties", "dare", "della", "task-arithmetic"]


@pytest.mark.parametrize(("kind", "strategy", "method"), [(*cell, METHOD[n % 6]) for n, cell in enumerate(ALL)])
def test_one_adapter_at_weight_1_is_itself(make: Make, tmp_path: Path, kind: str, strategy: str, method: str) -> None:
    folder = make(kind, strategy)
    density = {} if METHODS[method].thins is None else {"density": 1.0}
    report = adapters.combine({folder: 1.0}, tmp_path / "out", method=method, **density)
    one, two = manifest.read_manifest(folder), manifest.read_manifest(tmp_path / "out")
    assert report.itself
    assert one["strategy"] == two["strategy"]
    assert one["tensors"] == two["tensors"]
    assert one["head"] == two["head"]
    assert two["made"]["from"] == [str(folder)]
    file = manifest.WEIGHTS
    assert (folder / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    assert torch.equal(
        tiny.logits(live(folder), tiny.inputs(live(folder))),
        tiny.logits(live(tmp_path / "out"), tiny.inputs(live(folder))),
    )


def test_an_adapter_that_counts_for_nothing_changes_nothing(make: Make, tmp_path: Path) -> None:
    folder = make("bert", "rslora")
    report = adapters.combine({folder: 1, make("bert", "dora"): 0}, tmp_path / "out", head=folder)
    assert report.itself
    assert manifest.read_manifest(tmp_path / "out")["tensors"] == manifest.read_manifest(folder)["tensors"]


@pytest.mark.parametrize(("kind", "first", "second"), PAIRS)
def test_a_sum_is_the_sum_of_what_each_did(make: Make, tmp_path: Path, kind: str, first: str, second: str) -> None:
    one, two = make(kind, first), make(kind, second, 2)
    weights = {one: 1.0, two: 1.0} if first == "dora" else {one: 0.7, two: -0.4}
    report = adapters.combine(weights, tmp_path / "out", head=one)
    assert report.error < 1e-5
    reference = summed(one.parent / kind, weights, one)
    close(live(tmp_path / "out"), reference)
    # Merged afterwards, and merged at once: the same model.
    adapters.merge_on_disk(tmp_path / "out", tmp_path / "merged", check_logits=False)
    proven(adapters.combine(weights, tmp_path / "at-once", head=one, merged=True), "the weighted sum")
    for name in ("merged", "at-once"):
        close(type(reference).from_pretrained(tmp_path / name), reference)


@pytest.mark.parametrize(
    ("kind", "first", "second", "method"),
    [
        ("bert", "dora", "lora", "ties"),
        ("gpt2", "full", "freeze", "dare"),
        ("vit", "rslora", "bitfit", "della"),
        ("t5", "lora", "rslora", "ties"),
        ("llama", "freeze", "dora", "della"),
    ],
)
def test_each_method_works_on_what_each_strategy_did(
    make: Make, tmp_path: Path, kind: str, first: str, second: str, method: str
) -> None:
    folders, weights = [make(kind, first), make(kind, second, 2)], [0.7, 0.6]
    options: dict[str, Any] = {"method": method, "head": folders[0], "density": 0.4, "seed": 3}
    adapters.combine(list(zip(folders, weights, strict=True)), tmp_path / "out", **options)
    report = adapters.combine(list(zip(folders, weights, strict=True)), tmp_path / "merged", merged=True, **options)
    proven(report, f"with what {method} makes of what the adapters did")
    found = adapters.merge(adapters.load(tmp_path / "out"))
    plain = type(found).from_pretrained(tmp_path / "merged")
    parts = [changes.read(folder) for folder in folders]
    bases = [changes.originals(part) for part in parts]
    for name in {name for part in parts for name in part.inside}:
        terms = []
        for part, base, weight in zip(parts, bases, weights, strict=True):
            if name in part.inside:
                seed = arithmetic.seeded(3, part.document["files"][manifest.WEIGHTS]["sha256"], name)
                terms.append(Term(weight, base.delta(name, part.inside[name]), seed))
                old = base.old(name)
        expected = old + METHODS[method](terms, 0.4, sum(weights))
        torch.testing.assert_close(found.state_dict()[name], expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(plain.state_dict()[name], expected, atol=2e-6, rtol=1e-5)


EVERY = sorted({*adapters.STRATEGIES, "lora_bias", "patterns"} - {"peft"})  # lora_bias is the row of peft
LAW = {"boft": {"boft_block_size": 4}, "loha": {"r": 2}, "lokr": {"r": 2}, "hra": {"r": 2}, "pissa": {"r": 3}}


@pytest.mark.parametrize("strategy", EVERY)
def test_every_method_over_every_strategy(make: Make, tmp_path: Path, strategy: str) -> None:
    """One at weight 1 is itself; two are what the method makes, in float64, of what a merge of each alone changes."""
    if strategy == "qlora":
        pytest.importorskip("bitsandbytes")
    one = make("bert", strategy, **LAW.get(strategy, {}))
    two = make("bert", "qlora" if strategy == "qlora" else "rslora", 2)
    parts = [changes.read(folder) for folder in (one, two)]
    bases = [changes.originals(part) for part in parts]
    for name, method in METHODS.items():
        density = {} if method.thins is None else {"density": 1.0}
        if not method.cuts and not method.single:
            adapters.combine({one: 1.0}, tmp_path / "same", method=name, **density)
            file = manifest.WEIGHTS
            assert (one / file).read_bytes() == (tmp_path / "same" / file).read_bytes()
        weights = [-0.7] if method.single else [0.7, 0.4]
        asked = [(one, 0.7)] if method.single else [(one, 0.7), (two, 0.4)]
        options: dict[str, Any] = {"rank": 32} if method.cuts else {}  # as wide as the matrices: nothing is cut
        adapters.combine(asked, tmp_path / "out", method=name, head=one, seed=5, **options)
        found = changes.read(tmp_path / "out")
        base = changes.originals(found)
        for tensor in {tensor for part in parts[: len(asked)] for tensor in part.inside}:
            terms = []
            for part, own, weight in zip(parts, bases, weights, strict=False):
                if tensor in part.inside:
                    seed = arithmetic.seeded(5, part.document["files"][manifest.WEIGHTS]["sha256"], tensor)
                    terms.append(Term(weight, own.delta(tensor, part.inside[tensor]).double(), seed))
            kept = method.density
            expected = method(terms, kept, sum(map(abs, weights)))
            made = found.inside.get(tensor)
            delta = base.delta(tensor, made).double() if made is not None else torch.zeros_like(expected)
            assert torch.allclose(delta, expected, atol=3e-6, rtol=1e-4), f"{name}, {tensor}"


def test_low_rank_updates_stay_factors_side_by_side(make: Make, tmp_path: Path) -> None:
    one, two = make("bert", "rslora"), make("bert", "patterns", 2)
    report = adapters.combine({one: 0.5, two: 2.0}, tmp_path / "out", head=two)
    assert (report.strategy, report.ranks, report.error, report.whole) == ("lora", (5, 8), 0.0, 2)
    found = changes.read(tmp_path / "out")
    parts = [changes.read(folder).inside for folder in (one, two)]
    for name, edit in found.inside.items():
        expected = 0.5 * parts[0][name].delta().double() + 2 * parts[1][name].delta().double()  # type: ignore[attr-defined]
        torch.testing.assert_close(edit.delta().double(), expected, atol=1e-6, rtol=1e-5)  # type: ignore[attr-defined]
    document = manifest.read_manifest(tmp_path / "out")
    assert document["made"]["digests"] == [manifest.read_manifest(folder)["digest"] for folder in (one, two)]
    assert "made      by combine of" in "\n".join(lines(describe(tmp_path / "out")))
    assert "at 2.0; method linear, exact" in "\n".join(lines(describe(tmp_path / "out")))


def test_a_low_rank_update_with_biases_stays_low_rank(make: Make, tmp_path: Path) -> None:
    """peft's lora_bias comes as merged layers; what it did to the weights still has the factors' rank."""
    one, two = make("bert", "lora_bias"), make("bert", "lora_bias", 2)
    report = adapters.combine({one: 1, two: 1}, tmp_path / "out", head=one)
    assert (report.strategy, report.ranks, report.modules, report.whole) == ("lora", (6, 6), 6, 8)
    assert report.error < 1e-5


def test_whole_tensors_stay_whole(make: Make, tmp_path: Path) -> None:
    one, two = make("bert", "bitfit"), make("bert", "freeze", 2)
    report = adapters.combine({one: 0.5, two: 0.5}, tmp_path / "out", head=one)
    assert (report.strategy, report.modules, report.error) == ("freeze", 0, 0.0)
    cut = adapters.combine({one: 0.5, two: 0.5}, tmp_path / "cut", head=one, rank=4)
    assert (cut.strategy, cut.ranks) == ("lora", (4, 4))
    assert 0 < cut.error < 1


def test_sums_have_three_names(make: Make, tmp_path: Path) -> None:
    weights = {make("bert", "rslora"): 0.3, make("bert", "dora", 2): 0.9}
    written = []
    for method in ("linear", "cat", "task-arithmetic"):
        adapters.combine(weights, tmp_path / method, method=method, head=next(iter(weights)))
        written.append(manifest.read_manifest(tmp_path / method)["tensors"])
    assert written[0] == written[1] == written[2]
    halves = {folder: weight / 2 for folder, weight in weights.items()}
    adapters.combine(halves, tmp_path / "scaled", method="task-arithmetic", scale=2.0, head=next(iter(weights)))
    assert manifest.read_manifest(tmp_path / "scaled")["tensors"] == written[0]


@pytest.mark.parametrize("method", ["linear", "svd", "ties", "dare", "della"])
def test_the_order_of_the_adapters_does_not_matter(make: Make, tmp_path: Path, method: str) -> None:
    one, two = make("llama", "patterns"), make("llama", "lora", 2)
    rank = {"rank": 4} if method == "svd" else {}
    for name, order in (("there", [(one, 0.7), (two, 0.5)]), ("back", [(two, 0.5), (one, 0.7)])):
        adapters.combine(order, tmp_path / name, method=method, head=one, **rank)
    close(live(tmp_path / "there"), live(tmp_path / "back"))


@pytest.mark.parametrize(
    ("kind", "strategy"), [("bert", "rslora"), ("bert", "dora"), ("gpt2", "full"), ("vit", "bitfit")]
)
def test_taken_away_twice_it_is_itself(make: Make, tmp_path: Path, kind: str, strategy: str) -> None:
    folder = make(kind, strategy)
    adapters.combine({folder: 1}, tmp_path / "away", method="negate")
    close(live(tmp_path / "away"), summed(folder.parent / kind, {folder: -1}, folder))
    adapters.combine({tmp_path / "away": 1}, tmp_path / "back", method="negate")
    close(live(tmp_path / "back"), live(folder), 1e-6)


@pytest.mark.parametrize("method", ["ties", "dare", "della"])
def test_without_anything_left_out_and_without_conflict_each_method_is_the_sum(
    make: Make, tmp_path: Path, method: str
) -> None:
    folder = make("gpt2", "rslora")
    twice = [(folder, 0.5), (folder, 0.25)]
    adapters.combine(twice, tmp_path / "out", method=method, density=1.0)
    close(live(tmp_path / "out"), summed(folder.parent / "gpt2", {folder: 0.75}, folder))


def test_what_was_combined_trains_on(make: Make, tmp_path: Path) -> None:
    for method, rank in (("linear", None), ("ties", 4), ("dare", None)):
        one, two = make("bert", "rslora"), make("bert", "dora", 2)
        folder = tmp_path / method
        adapters.combine({one: 0.5, two: 0.5}, folder, method=method, head=one, rank=rank)
        adapted = adapters.load(folder)
        before = {name: tensor.clone() for name, tensor in adapted.state().items()}
        args = {"max_steps": 3, "learning_rate": 1e-2, "warmup_steps": 0, "disable_tqdm": True, "report_to": "none"}
        adapters.Trainer(
            adapted, {"output_dir": str(tmp_path / "run"), "save_strategy": "no", **args}, tiny.rows(24)
        ).train()
        assert all(
            not torch.equal(before[name], tensor) for name, tensor in adapted.state().items() if "key" not in name
        )
        again = adapters.load(adapters.save(adapted, tmp_path / f"{method}-on"))
        assert torch.equal(tiny.logits(again.model), tiny.logits(adapted.model))


# ---------------------------------------------------------------------- ranks


@pytest.mark.parametrize(("size"), [{"rank": 3}, {"energy": 0.8}])
def test_a_sum_is_cut_to_a_rank_and_says_what_it_lost(make: Make, tmp_path: Path, size: dict[str, Any]) -> None:
    weights = {make("bert", "rslora"): 0.6, make("bert", "dora", 2): 0.4}
    report = adapters.combine(weights, tmp_path / "out", method="svd", head=next(iter(weights)), **size)
    exact = adapters.combine(weights, tmp_path / "exact", head=next(iter(weights)))
    assert exact.error == 0
    assert (exact.strategy, exact.dense) == ("freeze", 18)
    found, whole = changes.read(tmp_path / "out"), changes.read(tmp_path / "exact")
    base = changes.originals(whole)
    lost = norm = 0.0
    shares = {}
    for name, edit in whole.inside.items():
        if not name.endswith(".weight"):
            continue
        delta = base.delta(name, edit).double()
        values = torch.linalg.svdvals(delta)
        rest = (delta - found.inside[name].delta().double()).norm()  # type: ignore[attr-defined]
        rank = next(
            i for i in range(33) if rest <= values[i:].norm() * 1.001 + 1e-6 and rest >= values[i:].norm() * 0.99 - 1e-6
        )
        assert rank == 3 if "rank" in size else values[:rank].square().sum() >= 0.8 * values.square().sum()
        lost, norm = lost + float(rest**2), norm + float(delta.norm() ** 2)
        shares[name.removesuffix(".weight")] = float(rest / delta.norm())
    assert report.error == pytest.approx((lost / norm) ** 0.5, rel=1e-3)
    assert report.worst_error == pytest.approx(max(shares.values()), rel=1e-3)
    assert report.worst == max(shares, key=lambda name: shares[name])
    made = manifest.read_manifest(tmp_path / "out")["made"]
    assert made["error"] == report.error
    assert made["worst"] == {report.worst: report.worst_error}


def test_embeddings_that_lora_trained_stay_factors(make: Make, tmp_path: Path) -> None:
    wanted = {"target_modules": ["word_embeddings", "query"]}
    one, two = make("bert", "lora", 1, **wanted), make("bert", "rslora", 2, **wanted)
    report = adapters.combine({one: 0.5, two: 0.5}, tmp_path / "out", head=one)
    assert (report.modules, report.ranks, report.whole) == (4, (6, 6), 2)
    close(live(tmp_path / "out"), summed(one.parent / "bert", {one: 0.5, two: 0.5}, one))


# ---------------------------------------------------------------------- the arithmetic


def some(count: int, shape: tuple[int, ...] = (6, 8)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def ties_by_hand(deltas: list[torch.Tensor], weights: list[float], density: float) -> torch.Tensor:
    """Yadav et al., 2023, entry by entry."""
    kept = []
    for delta in deltas:
        flat = delta.flatten().tolist()
        order = sorted(range(len(flat)), key=lambda i: -abs(flat[i]))[: max(1, round(density * len(flat)))]
        kept.append([value if i in order else 0.0 for i, value in enumerate(flat)])
    result = []
    for entries in zip(*kept, strict=True):
        votes = sum(w * e for w, e in zip(weights, entries, strict=True))
        agreeing = [(w, e) for w, e in zip(weights, entries, strict=True) if w * e * votes > 0]
        mean = sum(w * e for w, e in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.0
        result.append(sum(weights) * mean)
    return torch.tensor(result).view_as(deltas[0])


@pytest.mark.parametrize("weights", [[1 / 3] * 3, [1.0, 1.0, 1.0], [0.2, 0.5, 0.9]])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_the_papers(weights: list[float], density: float) -> None:
    deltas = some(3)
    terms = [Term(weight, delta, 0) for weight, delta in zip(weights, deltas, strict=True)]
    found = METHODS["ties"](terms, density, sum(weights))
    torch.testing.assert_close(found, ties_by_hand(deltas, weights, density))


def test_dare_drops_at_random_and_keeps_the_expectation() -> None:
    delta = some(1, (200, 300))[0]
    kept = arithmetic.drop(delta, 0.3, 7)
    mask = torch.rand(delta.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) < 0.3
    torch.testing.assert_close(kept, torch.where(mask, delta / 0.3, torch.zeros(())))
    assert float((kept != 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    draws = torch.stack([arithmetic.drop(delta[:5, :5], 0.3, seed) for seed in range(4000)])
    torch.testing.assert_close(draws.mean(0), delta[:5, :5], atol=0.2, rtol=0.1)
    terms = [Term(0.6, delta, 7), Term(0.4, -delta, 8)]
    expected = 0.6 * kept - 0.4 * arithmetic.drop(delta, 0.3, 8)
    torch.testing.assert_close(METHODS["dare"](terms, 0.3, 1.0), expected)


def test_della_keeps_large_entries_more_often() -> None:
    delta = some(1, (400, 11))[0]
    ranks = torch.tensor([[sorted(row, key=abs).index(value) for value in row] for row in delta.tolist()])
    chance = 0.4 + arithmetic.SPREAD * (1 - 1e-6) * (ranks.double() / 10 - 0.5)
    drawn = torch.rand(delta.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = torch.where(drawn < chance, delta / chance.float(), torch.zeros(()))
    found = arithmetic.drop_by_magnitude(delta, 0.4, 5)
    torch.testing.assert_close(found, expected)
    draws = (
        torch.stack([arithmetic.drop_by_magnitude(delta[:2], 0.4, seed) != 0 for seed in range(3000)]).float().mean(0)
    )
    torch.testing.assert_close(draws.double(), chance[:2], atol=0.04, rtol=0)
    terms = [Term(0.6, delta, 5), Term(0.4, delta.flip(0), 6)]
    thinned = [expected, arithmetic.drop_by_magnitude(delta.flip(0), 0.4, 6)]
    torch.testing.assert_close(METHODS["della"](terms, 0.4, 1.0), ties_by_hand(thinned, [0.6, 0.4], 1.0))


@pytest.mark.parametrize("density", [0.01, 0.99])
def test_chances_stay_chances(density: float) -> None:
    found = arithmetic.drop_by_magnitude(some(1, (30, 40))[0], density, 0)
    assert bool(found.isfinite().all())
    assert float((found != 0).float().mean()) == pytest.approx(density, abs=0.02)
    assert arithmetic.drop_by_magnitude(torch.ones(4, 1), 0.5, 0).shape == (4, 1)


def test_what_is_drawn_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    for method in ("dare", "della"):
        METHODS[method]([Term(1.0, some(1)[0], 3)], 0.5, 1.0)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_same_seed_draws_the_same_and_another_one_something_else(make: Make, tmp_path: Path) -> None:
    folder = make("bert", "rslora")
    tensors = []
    for number, seed in enumerate((4, 4, 5)):
        adapters.combine({folder: 1}, tmp_path / str(number), method="dare", seed=seed)
        tensors.append(manifest.read_manifest(tmp_path / str(number))["tensors"])
    assert tensors[0] == tensors[1] != tensors[2]


def test_an_adapter_that_left_a_tensor_alone_still_counts_in_the_mean(make: Make, tmp_path: Path) -> None:
    """TIES divides by those that changed an entry: one that changed nothing there does not halve the others' part."""
    one = make("llama", "lora", 1, layers_to_transform=[0])
    two = make("llama", "lora", 2, layers_to_transform=[1])
    adapters.combine({one: 0.5, two: 0.5}, tmp_path / "out", method="ties", density=1.0, head=one)
    close(live(tmp_path / "out"), summed(one.parent / "llama", {one: 1.0, two: 1.0}, one))


# ---------------------------------------------------------------------- heads and tokens


def test_two_new_heads_are_refused_unless_one_is_named(make: Make, tmp_path: Path) -> None:
    one, two = make("bert", "rslora"), make("bert", "lora", 2)
    with pytest.raises(adapters.RequestError, match=r"two adapters bring a new head each.*classifier.*--head"):
        adapters.combine({one: 0.5, two: 0.5}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for name in (two, two.name):
        report = adapters.combine({one: 0.5, two: 0.5}, tmp_path / "out", head=name)
        assert report.head == str(two)
        found, own = changes.read(tmp_path / "out"), changes.read(two)
        assert all(torch.equal(found.edits[name](None), own.edits[name](None)) for name in own.head)
    with pytest.raises(adapters.RequestError, match=r"no adapter of that name brings a head.*elsewhere"):
        adapters.combine({one: 0.5, two: 0.5}, tmp_path / "out", head="elsewhere")
    # A combination has the head of one of its parts: with that part it goes together.
    again = adapters.combine({tmp_path / "out": 0.5, two: 0.5}, tmp_path / "again")
    close(live(tmp_path / "again"), summed(one.parent / "bert", {one: 0.25, two: 0.75}, two))
    assert again.head == str(tmp_path / "out")


def test_the_head_of_a_pretrained_language_model_is_no_new_head(tmp_path: Path) -> None:
    base = tiny.folder("llama", tmp_path / "base", auto="AutoModelForCausalLM")
    folders = []
    for number, strategy in enumerate(("rslora", "full")):
        adapted = adapters.adapt(base, strategy, task="causal-lm")
        tiny.shake(adapted, seed=number)
        folders.append(adapters.save(adapted, tmp_path / strategy))
    report = adapters.combine(dict.fromkeys(folders, 0.5), tmp_path / "out")
    assert report.head == ""
    close(live(tmp_path / "out"), summed(Path(base), dict.fromkeys(folders, 0.5), folders[0]))


def spoken(tmp_path: Path, strategy: str, number: int, tokens: list[str], scale: float = 0.1) -> Path:
    base = tmp_path / "base"
    if not base.exists():
        tiny.folder("llama", base, auto="AutoModelForCausalLM")
    adapted = adapters.adapt(str(base), strategy, task="causal-lm", added_tokens=tokens)
    tiny.shake(adapted, seed=number)
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for _, tensor, axis in adapted.places():
            if axis is not None:
                rows = torch.randn(len(tokens), tensor.shape[1], generator=generator) * scale
                tensor.index_copy_(0, adapted.added_ids(tensor), rows)
    return adapters.save(adapted, tmp_path / f"{strategy}-{number}")


@pytest.mark.parametrize("strategy", ["rslora", "full"])
def test_rows_of_added_tokens_are_averaged(tmp_path: Path, strategy: str) -> None:
    one, two = (spoken(tmp_path, strategy, number, ["<a>", "<b>"]) for number in (1, 2))
    adapters.combine({one: 0.75, two: 0.25}, tmp_path / "out")
    found, first, second = (adapters.load(folder) for folder in (tmp_path / "out", one, two))
    assert found.vocabulary is not None
    ids = list(found.vocabulary.ids)
    weights = [a.model.get_input_embeddings().weight for a in (found, first, second)]
    torch.testing.assert_close(weights[0][ids], 0.75 * weights[1][ids] + 0.25 * weights[2][ids])
    torch.testing.assert_close(weights[0][:60], 0.75 * weights[1][:60] + 0.25 * weights[2][:60], atol=1e-6, rtol=1e-5)
    proven(adapters.combine({one: 0.75, two: 0.25}, tmp_path / "merged", merged=True), "the weighted sum")
    from transformers import AutoModelForCausalLM

    ids_in = {"input_ids": torch.tensor([[5, *ids, 9, 11]])}
    torch.testing.assert_close(
        tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids_in),
        tiny.logits(found.model, ids_in),
        atol=1e-5,
        rtol=1e-5,
    )
    with pytest.raises(adapters.RequestError, match="weights that sum to 0"):
        adapters.combine({one: 0.5, two: -0.5}, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_other_added_tokens_are_refused(tmp_path: Path) -> None:
    one, two = spoken(tmp_path, "lora", 1, ["<a>"]), spoken(tmp_path, "lora", 2, ["<c>"])
    with pytest.raises(adapters.RequestError, match=r"differ in their added tokens.*<a>.*<c>"):
        adapters.combine({one: 0.5, two: 0.5}, tmp_path / "out")
    whole = spoken(tmp_path, "full", 3, ["<a>"])
    with pytest.raises(adapters.RequestError, match="rows trained alone in one adapter"):
        adapters.combine({one: 0.5, whole: 0.5}, tmp_path / "out")


# ---------------------------------------------------------------------- packed backbones


def test_adapters_over_four_bits_go_together_and_with_no_others(make: Make, tmp_path: Path) -> None:
    one, two = make("bert", "qlora", 1, r=2), make("bert", "qlora", 2, r=3)
    report = adapters.combine({one: 0.5, two: 0.5}, tmp_path / "out", head=one)
    assert (report.ranks, report.error) == ((5, 5), 0.0)
    thinned = adapters.combine({one: 0.5, two: 0.5}, tmp_path / "thin", method="ties", head=one)
    assert thinned.strategy == "lora"  # beside packed weights stand factors only
    assert adapters.load(tmp_path / "out").storage.quantization == "nf4"
    full = make("bert", "lora")
    with pytest.raises(adapters.RequestError, match="differ in their storage of the frozen weights"):
        adapters.combine({one: 0.5, full: 0.5}, tmp_path / "other", head=one)


# ---------------------------------------------------------------------- merged models prove themselves


def test_one_adapter_merged_at_weight_1_answers_as_itself(make: Make, tmp_path: Path) -> None:
    folder = make("gpt2", "rslora")
    report = adapters.combine({folder: 1.0}, tmp_path / "merged", merged=True, rows=["my parcel is late", "money back"])
    assert report.itself
    proven(report, "the adapter itself, on its backbone")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    digest = manifest.read_manifest(folder)["digest"]
    assert config["merged_adapters"] == [digest]
    parts = {folder: 1.0, make("gpt2", "dora", 2): 0.0}
    adapters.combine(parts, tmp_path / "merged", head=folder, merged=True, check_logits=False)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["merged_adapters"] == [digest]  # what counts for nothing is not in it


@pytest.mark.parametrize("method", ["linear", "negate", "ties", "dare", "della"])
def test_a_merged_folder_that_answers_otherwise_is_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """What is written here is not what was asked for; the process that compares makes its own of the adapters."""
    parts = {make("bert", "rslora"): 0.6} | ({} if METHODS[method].single else {make("bert", "dora", 2): 0.4})
    edits = mixture.Mixture.edits
    monkeypatch.setattr(mixture.Mixture, "edits", lambda self, weights: edits(self, [2 * each for each in weights]))
    with pytest.raises(
        adapters.NumbersError, match=r"does not answer as the combined adapters do in memory.*merged.*logits within"
    ):
        adapters.combine(parts, tmp_path / "merged", method=method, head=next(iter(parts)), merged=True)
    assert list(tmp_path.iterdir()) == []
    unseen = adapters.combine(
        parts, tmp_path / "merged", method=method, head=next(iter(parts)), merged=True, check_logits=False
    )
    assert (unseen.logits_checked, unseen.skipped) == (False, "the logits check was not asked for")


def test_one_byte_of_a_merged_folder_is_enough(make: Make, tmp_path: Path) -> None:
    one, two = make("llama", "patterns"), make("llama", "lora", 2)
    adapters.combine({one: 0.5, two: 0.5}, tmp_path / "merged", head=one, merged=True)
    mixed = {"folders": [str(one), str(two)], "method": "linear", "density": 1.0, "scale": 1.0, "seed": 0}
    asked: Any = (mixed | {"head": str(one)}, (0.5, 0.5), str(tmp_path / "merged"), str(one.parent / "llama"), None)
    same = reference.compare(*asked)
    assert same["max_difference"] <= 1e-5 * same["spread"]
    assert same["dtype"] == "float32"
    file = tmp_path / "merged" / "model.safetensors"
    slot = shards.read_directory(tmp_path / "merged")["model.layers.1.mlp.up_proj.weight"]
    content = bytearray(file.read_bytes())
    content[slot.start + 3] ^= 0x40  # the exponent of one weight
    file.write_bytes(bytes(content))
    other = reference.compare(*asked)
    assert not other["max_difference"] <= 1e-4 * other["spread"]
    assert reference.compare(*asked, few=True)["spread"] != same["spread"]  # other, shorter inputs


def test_a_backbone_in_four_bits_and_a_head_that_reads_elsewhere(make: Make, tmp_path: Path) -> None:
    one, two = make("bert", "qlora", 1, r=2), make("bert", "qlora", 2, r=3)
    proven(adapters.combine({one: 0.5, two: 0.5}, tmp_path / "packed", head=one, merged=True), "the weighted sum")
    mean, plain = make("bert", "lora", 1, pooling="mean"), make("bert", "rslora", 2)
    report = adapters.combine({mean: 0.5, plain: 0.5}, tmp_path / "mean", head=mean, merged=True)
    proven(report, "the weighted sum")
    assert adapters.load(tmp_path / "mean").task.pooling == "mean"  # type: ignore[attr-defined]


def test_rounding_to_16_bits_is_measured_and_may_be_accepted(make: Make, tmp_path: Path) -> None:
    one, two = make("bert", "rslora"), make("bert", "dora", 2)
    request: dict[str, Any] = {"head": one, "merged": True, "dtype": "bfloat16"}
    report = adapters.combine({one: 0.6, two: 0.4}, tmp_path / "merged", **request)
    assert report.bound == 0.1
    assert report.max_difference is not None
    assert report.spread is not None
    assert 1e-4 * report.spread < report.max_difference <= 0.1 * report.spread
    assert not report.accepted


def test_what_is_too_large_for_this_machine_says_so(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = make("bert", "rslora"), make("bert", "dora", 2)
    asked = []
    monkeypatch.setattr(exactness, "too_large", lambda *given: asked.append(given) or "no memory for two models")
    report = adapters.combine({one: 0.6, two: 0.4}, tmp_path / "merged", head=one, merged=True)
    assert (report.logits_checked, report.skipped) == (False, "no memory for two models")
    (size, mapped), *_ = asked
    assert 0 < mapped < size  # what the edits change is in memory
    command(f"{one}:0.6", f"{two}:0.4", "--head", one, "--merge", "-o", tmp_path / "merged")
    assert "answers   not compared: no memory for two models" in capsys.readouterr().out


# ---------------------------------------------------------------------- weights found on rows


def bowl(weights: tuple[float, ...]) -> dict[str, float]:
    """Best at 0.3, 0.8, 0.1, 0.1 ...; the metric is coarse, the loss tells more."""
    far = math.dist(weights, (0.3, 0.8, *([0.1] * (len(weights) - 2)))[: len(weights)])
    return {"accuracy": round(1 - far, 1), "loss": far}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_search_gets_near_the_best_within_its_budget(count: int) -> None:
    found = weighing.weighed((1.0,) * count, bowl, "accuracy", True, trials=60, seed=1)
    assert len(found) <= 60
    assert found[0].weights == (1.0,) * count
    best = weighing.chosen(found)
    assert best.numbers["loss"] < (0.1 if count < 3 else 0.4)
    assert best.rank >= found[0].rank
    assert found == weighing.weighed((1.0,) * count, bowl, "accuracy", True, trials=60, seed=1)
    assert len({one.weights for one in found}) == len(found)
    assert all(weight >= 0 for one in found for weight in one.weights)


def test_a_search_of_one_trial_keeps_the_start() -> None:
    assert [one.weights for one in weighing.weighed((0.123456, 2.0), bowl, "loss", False, trials=1)] == [
        (0.123456, 2.0)
    ]
    nan = weighing.weighed((1.0, 1.0), lambda w: {"loss": math.nan if w[0] > 0.5 else w[1]}, "loss", False, trials=20)
    assert weighing.chosen(nan).weights[0] <= 0.5


@pytest.mark.parametrize(("second", "size"), [("lora", {}), ("dora", {}), ("dora", {"rank": 3})])
def test_weights_are_found_on_rows(make: Make, tmp_path: Path, second: str, size: dict[str, Any]) -> None:
    one, two = make("bert", "rslora"), make("bert", second, 2)
    rows = tiny.rows(24, seed=5)
    report = adapters.combine({one: 0.5, two: 0.5}, tmp_path / "out", head=one, search=rows, trials=9, seed=2, **size)
    assert len(report.searched) == 9
    assert report.metric == "accuracy"
    assert report.searched[0]["weights"] == [0.5, 0.5]
    best = max(report.searched, key=lambda found: (found["accuracy"], -found["loss"]))
    assert list(report.weights) == best["weights"]
    assert best["accuracy"] >= report.searched[0]["accuracy"]
    measured = adapters.evaluate(adapters.load(tmp_path / "out"), rows)
    assert measured["accuracy"] == best["accuracy"]
    assert measured["loss"] == pytest.approx(best["loss"], abs=1e-5)
    made = manifest.read_manifest(tmp_path / "out")["made"]
    assert made["search"]["trials"] == 9
    assert made["weights"] == best["weights"]


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "teis"}, "unknown method 'teis'.*Did you mean 'ties'"),
        ({"rank": 33}, "a rank above the matrix.*at most 32.*found 33.*Give a lower rank"),
        ({"rank": 0}, "a wrong rank"),
        ({"energy": 1.5}, "a wrong energy"),
        ({"rank": 2, "energy": 0.5}, "exclude each other"),
        ({"method": "svd"}, "svd needs a rank or an energy"),
        ({"method": "negate"}, "negate takes one adapter.*found 2.*negative weights"),
        ({"density": 0.5}, "a density that nothing asks for.*ties, dare, della.*Leave density out"),
        ({"method": "dare", "density": 0.0}, "a wrong density.*above 0, up to 1"),
        ({"scale": 0}, "a wrong scale"),
        ({"scale": math.inf}, "a wrong scale"),
        ({"merged": True, "rank": 2}, "a merge is exact.*Leave rank and energy out"),
        ({"dtype": "bfloat16"}, "a dtype is a merged model's"),
        ({"rows": ["a parcel"]}, r"logits of a merged model are compared \(rows\).*Say merged"),
        ({"check_logits": False}, r"logits of a merged model are compared \(check_logits\)"),
        ({"accept": True}, r"logits of a merged model are compared \(accept\)"),
        ({"rows": [object()]}, "no plain values"),
        ({"search": [], "energy": 0.5}, "a search needs ranks that stay"),
        ({"search": [], "trials": 0}, "a wrong number of trials"),
    ],
)
def test_requests_that_cannot_be(make: Make, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    one, two = make("bert", "rslora"), make("bert", "lora", 2)
    with pytest.raises(adapters.RequestError, match=said):
        adapters.combine({one: 0.5, two: 0.5}, tmp_path / "out", head=one, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weight", [math.nan, math.inf, "0.5", None, True])
def test_a_weight_that_is_no_number_is_refused(make: Make, tmp_path: Path, weight: Any) -> None:
    folder = make("bert", "rslora")
    with pytest.raises(adapters.RequestError, match=rf"a weight that is no number \({folder}\).*{weight!r}"):
        adapters.combine({folder: weight}, tmp_path / "out")
    with pytest.raises(adapters.RequestError, match="every weight is 0"):
        adapters.combine({folder: 0}, tmp_path / "out")
    with pytest.raises(adapters.RequestError, match="there is nothing to combine"):
        adapters.combine({}, tmp_path / "out")


def test_a_rank_of_no_matrix_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(adapters.RequestError, match="no linear map was changed"):
        adapters.combine({make("bert", "bitfit"): 1}, tmp_path / "out", rank=2)


def test_different_backbones_are_refused(make: Make, tmp_path: Path) -> None:
    one = make("bert", "rslora")
    tiny.folder("bert", tmp_path / "base", seed=7)
    adapted = adapters.adapt(str(tmp_path / "base"), "lora", labels=list(tiny.LABELS))
    two = adapters.save(adapted, tmp_path / "two")
    with pytest.raises(adapters.BackboneError, match=r"different backbones.*shared tensors differ"):
        adapters.combine({one: 0.5, two: 0.5}, tmp_path / "out", head=one)
    with pytest.raises(adapters.BackboneError, match="not the backbone that the adapter was trained on"):
        adapters.combine({make("bert", "dora"): 0.5}, tmp_path / "out", base=tmp_path / "base")
    with pytest.raises(adapters.BackboneError, match="not the backbone that the adapter was trained on"):
        adapters.combine({one: 0.5}, tmp_path / "out", base=tmp_path / "base")  # a sum of factors reads no value of it
    assert not (tmp_path / "out").exists()


def masked(tmp_path: Path, number: int, strategy: str = "rslora", **options: Any) -> Path:
    """An adapter of a masked language model, whose pretrained head trains with it."""
    base = tmp_path / "base"
    if not base.exists():
        tiny.folder("bert", base, auto="AutoModelForMaskedLM")
    adapted = adapters.adapt(str(base), strategy, task="masked-lm", **options)
    tiny.shake(adapted, seed=number)
    return adapters.save(adapted, tmp_path / f"masked-{number}")


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, -0.2)])
def test_pretrained_heads_are_changed_like_any_tensor(tmp_path: Path, weights: tuple[float, float]) -> None:
    one, two = masked(tmp_path, 1), masked(tmp_path, 2, "lora")
    report = adapters.combine(dict(zip((one, two), weights, strict=True)), tmp_path / "out")
    proven(
        adapters.combine(dict(zip((one, two), weights, strict=True)), tmp_path / "merged", merged=True),
        "the weighted sum",
    )
    from transformers import AutoModelForMaskedLM

    total = {}
    first, second = (adapters.merge(adapters.load(folder)).state_dict() for folder in (one, two))
    bare = AutoModelForMaskedLM.from_pretrained(tmp_path / "base")
    for name, old in bare.state_dict().items():
        a, b = first[name].double() - old, second[name].double() - old
        total[name] = old + weights[0] * a + weights[1] * b
    reference = bare.double()
    reference.load_state_dict(total)
    assert report.strategy == "lora"
    close(live(tmp_path / "out"), reference)
    close(AutoModelForMaskedLM.from_pretrained(tmp_path / "merged"), reference)
    named = adapters.combine(dict(zip((one, two), weights, strict=True)), tmp_path / "named", head=two)
    assert named.head == str(two)
    own = changes.read(two)
    found = changes.read(tmp_path / "named")
    assert all(torch.equal(found.edits[name](None), own.edits[name](None)) for name in own.head)


def test_adapters_of_two_tasks_of_one_backbone_go_together(tmp_path: Path) -> None:
    one = masked(tmp_path, 1)
    classes = adapters.adapt(str(tmp_path / "base"), "lora", labels=list(tiny.LABELS))
    tiny.shake(classes)
    two = adapters.save(classes, tmp_path / "two")
    report = adapters.combine({one: 0.5, two: 0.5}, tmp_path / "out")
    assert report.head == str(two)
    assert adapters.load(tmp_path / "out").task.name == "text-classification"


def test_tensors_that_the_models_class_lacks_are_refused(tmp_path: Path) -> None:
    base = tiny.folder("bert", tmp_path / "base")
    pooled = adapters.adapt(base, "lora", labels=list(tiny.LABELS), unfrozen_parameters=["pooler"])
    tagged = adapters.adapt(base, "lora", task="token-classification", labels=["O", "B-X", "I-X"])
    one, two = adapters.save(pooled, tmp_path / "one"), adapters.save(tagged, tmp_path / "two")
    said = "changes tensors that the result's model class does not take.*BertForTokenClassification.*pooler"
    with pytest.raises(adapters.RequestError, match=said):
        adapters.combine({one: 0.5, two: 0.5}, tmp_path / "out", head=two)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_its_backbone_is_refused(make: Make, tmp_path: Path) -> None:
    base = make("bert", "lora").parent / "bert"
    adapted = adapters.adapt(str(base), "probe", labels=list(tiny.LABELS), pooling="mean")
    alone = adapters.save(adapted, tmp_path / "alone")
    adapters.merge_on_disk(alone, tmp_path / "standing", check_logits=False)
    with pytest.raises(adapters.RequestError, match=r"holds its backbone inside.*merged from"):
        adapters.combine({tmp_path / "standing": 1.0}, tmp_path / "out")


def test_outputs_that_are_taken_are_refused(make: Make, tmp_path: Path) -> None:
    one, two = make("bert", "rslora"), make("bert", "lora", 2)
    before = (one / manifest.MANIFEST).read_bytes()
    for taken in (one, one.parent / "bert"):
        with pytest.raises(adapters.FolderError):
            adapters.combine({one: 0.5, two: 0.5}, taken, head=one)
    with pytest.raises(adapters.FolderError, match="the output is one of the inputs"):
        adapters.combine({one: 1.0}, one)
    assert (one / manifest.MANIFEST).read_bytes() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for merged in (False, True):
        with pytest.raises(adapters.FolderError, match=r"thesis.txt"):
            adapters.combine({one: 1.0}, tmp_path / "full", merged=merged)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_full_disk_leaves_what_stood_there(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: float
) -> None:
    one, two = make("bert", "rslora"), make("bert", "lora", 2)
    adapters.combine({two: 1.0}, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "write_text", full)  # the weights are written by then
    for merged, target in ((False, "out"), (True, "merged")):
        with pytest.raises(adapters.DiskError, match=rf"cannot be written.*{target}.*No space left.*Make room"):
            adapters.combine({one: weight}, tmp_path / target, merged=merged)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_numbers_that_overflow_are_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(adapters.NumbersError, match="not finite"):
        adapters.combine({make("bert", "rslora"): 1e39}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- the command


def command(*words: Any) -> None:
    from adapters.cli import app

    app(args=["combine", *map(str, words)], standalone_mode=False)


def test_the_command(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = make("bert", "rslora"), make("bert", "dora", 2)
    command(f"{one}:0.6", f"{two}:0.4", "--method", "svd", "--rank", 4, "--head", one, "-o", tmp_path / "out")
    said = capsys.readouterr().out
    assert f"combined  {tmp_path / 'out'}: {one} at 0.6, {two} at 0.4" in said
    assert "method    svd\n" in said
    assert "holds     18 linear maps of rank 4, 2 whole tensors (lora)" in said
    assert "% of the change is left out, most in bert.encoder" in said
    assert f"next      adapters evaluate {tmp_path / 'out'} --data ROWS" in said
    command(one, "-o", tmp_path / "same")
    assert "the adapter itself, bit for bit (lora)" in capsys.readouterr().out
    command(f"{one}:0.6", f"{two}:0.4", "--head", one.name, "--merge", "-o", tmp_path / "merged", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["form"], found["weights"]) == ("merged", [0.6, 0.4])
    command(f"{one}:0.6", f"{two}:0.4", "--head", one.name, "--merge", "-o", tmp_path / "merged")
    said = capsys.readouterr().out
    assert "answers   agree on 100 %, logits within " in said
    assert "against   the backbone in memory, with the weighted sum of what the adapters did in it" in said
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in tiny.rows(12)))
    command(f"{one}:0.6", f"{two}:0.4", "--head", one.name, "--search", rows, "--trials", 3, "-o", tmp_path / "out")
    said = capsys.readouterr().out
    assert said.count("tried ") == 3
    assert said.count(" *\n") == 1
    assert "18 of them are linear maps whose change is dense; --rank N" in said
    command(f"{one}:0.6", f"{two}:0.4", "--head", one.name, "--method", "dare", "--seed", 7, "-o", tmp_path / "out")
    assert "method    dare, density 0.5, seed 7\n" in capsys.readouterr().out
    assert "method dare, density 0.5, seed 7" in "\n".join(lines(describe(tmp_path / "out")))
    command(one, "--method", "ties", "--scale", 2, "-o", tmp_path / "out")
    assert "method    ties, density 0.2, scale 2\n" in capsys.readouterr().out
    parts = tmp_path / "parts"
    parts.mkdir()
    for part in ("train", "test"):
        (parts / f"{part}.csv").write_text(rows.read_text())
    with pytest.raises(adapters.RequestError, match=r"no part 'validation'.*test, train.*validation rows"):
        command(f"{one}:0.6", "-o", tmp_path / "out", "--search", parts)


@pytest.mark.parametrize("entry", ["a:b", "a:nan", ":0.5", "a:"])
def test_a_weight_of_the_command_that_is_no_number(entry: str) -> None:
    with pytest.raises(adapters.RequestError, match=r"a weight that is no number.*FOLDER:WEIGHT"):
        command(entry, "-o", "out")
