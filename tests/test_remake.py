"""Adapters that were computed: low-rank arithmetic, what adapters did, and folders written without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import adapters
from adapters import changes, lowrank, remake
from adapters.lowrank import Factors

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3},
    "freeze": {"layers": 1},
    "oft": {"oft_block_size": 8},
}
CELLS = [
    ("bert", "lora"),
    ("bert", "dora"),
    ("bert", "rslora"),
    ("bert", "bitfit"),
    ("bert", "freeze"),
    ("bert", "full"),
    ("bert", "oft"),
    ("bert", "ia3"),
    ("bert", "probe"),
    ("bert", "qlora"),
    ("gpt2", "lora"),
    ("gpt2", "full"),
    ("llama", "lora"),
    ("llama", "freeze"),
    ("vit", "lora"),
    ("vit", "full"),
    ("t5", "lora"),
]


def adapter(tmp_path: Path, kind: str, strategy: str, **options: Any) -> tuple[Any, Path]:
    made: tuple[Any, Path] = tiny.adapter(tmp_path, kind, strategy, **OPTIONS.get(strategy, {}) | options)
    return made


def taken_apart(found: changes.Changes, base: changes.Originals) -> tuple[dict[str, Factors], dict[str, torch.Tensor]]:
    """Every change as factors of full rank where a linear map inside the blocks stands, else as a whole tensor."""
    from adapters.anatomy import linear_maps
    from adapters.blueprint import drawn
    from adapters.storage import task_of

    net = drawn(base.folder, task_of(found.document, ""), {}).model
    maps = linear_maps(net)
    factors, whole = {}, {}
    for name, edit in found.edits.items():
        path = name.removesuffix(".weight")
        if name in found.head:
            whole[name] = edit(None)
        elif path in maps and path != name:
            delta = base.delta(name, edit)
            factors[path] = lowrank.factored(delta.T if maps[path].transposed else delta).factors
        else:
            whole[name] = edit(base.old(name))
    return factors, whole


@pytest.mark.parametrize(("kind", "strategy"), CELLS)
def test_an_adapter_taken_apart_and_written_anew_answers_the_same(tmp_path: Path, kind: str, strategy: str) -> None:
    adapted, folder = adapter(tmp_path, kind, strategy)
    found = changes.read(folder)
    base = changes.originals(found)
    factors, whole = taken_apart(found, base)
    made = {"by": "test", "from": [str(folder)]}
    out = remake.write(tmp_path / "out", found, base.folder, factors=factors, whole=whole, made=made)
    again = adapters.load(out)
    inputs = tiny.inputs(adapted.model)
    torch.testing.assert_close(
        tiny.logits(again.model, inputs), tiny.logits(adapted.model, inputs), atol=1e-5, rtol=1e-5
    )
    document = json.loads((out / "adapter.json").read_text())
    assert document["made"] == made
    assert document["reproducible"] is False
    merged = adapters.merge_on_disk(out, tmp_path / "merged")
    assert merged.agreement == 1.0


def test_layer_norms_train_beside_the_factors(tmp_path: Path) -> None:
    adapted, folder = adapter(tmp_path, "bert", "lora", unfrozen_parameters=["LayerNorm"])
    norms = [name for name in adapted.trained if "LayerNorm" in name]
    assert len(norms) == 14
    again = adapters.load(folder)
    assert torch.equal(tiny.logits(again.model), tiny.logits(adapted.model))
    plain = adapters.merge(again)
    torch.testing.assert_close(tiny.logits(plain), tiny.logits(adapted.model), atol=1e-5, rtol=1e-5)


def test_plain_peft_reads_what_trained_beside_the_factors(tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForSequenceClassification

    adapted, folder = adapter(tmp_path, "bert", "lora", unfrozen_parameters=["LayerNorm", "query.bias"])
    net = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    theirs = peft.PeftModel.from_pretrained(net, folder)
    torch.testing.assert_close(tiny.logits(theirs), tiny.logits(adapted.model), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["nowhere"], "finds nothing"),
        (["("], "no regular expression"),
        (["query.weight"], "cannot be adapted and train whole"),
    ],
)
def test_patterns_that_cannot_be(tmp_path: Path, patterns: list[str], said: str) -> None:
    with pytest.raises(adapters.RequestError, match=said):
        adapters.adapt(tiny.model("bert"), "lora", unfrozen_parameters=patterns)


# ---------------------------------------------------------------------- low rank


def matrix(out: int, wide: int, rank: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, rank, generator=generator) @ torch.randn(rank, wide, generator=generator)


def test_a_sum_of_factors_is_the_sum_of_the_products() -> None:
    one, two = (lowrank.factored(matrix(12, 9, rank, seed)).factors for rank, seed in ((2, 0), (3, 1)))
    both = lowrank.summed([(0.6, one), (-0.4, two)])
    assert both.rank == 5
    torch.testing.assert_close(both.up @ both.down, 0.6 * (one.up @ one.down) - 0.4 * (two.up @ two.down))


def test_the_smallest_rank_that_loses_nothing_is_found() -> None:
    fit = lowrank.factored(matrix(20, 30, 4))
    assert fit.factors.rank == 4
    torch.testing.assert_close(fit.factors.up @ fit.factors.down, matrix(20, 30, 4), atol=1e-5, rtol=1e-5)
    doubled = lowrank.summed([(1.0, fit.factors), (1.0, fit.factors)])
    again = lowrank.reduced(doubled)
    assert again.factors.rank == 4
    torch.testing.assert_close(again.factors.up @ again.factors.down, 2 * matrix(20, 30, 4), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_rank_is_cut_where_eckart_and_young_cut_it(rank: int) -> None:
    dense = torch.randn(16, 24, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(dense.double())
    for fit in (
        lowrank.factored(dense, rank=rank),
        lowrank.reduced(Factors(torch.eye(24), dense), rank=rank),
    ):
        assert fit.factors.rank == rank
        assert fit.error == pytest.approx(float(values[rank:].norm()), rel=1e-5)
        assert fit.norm == pytest.approx(float(dense.double().norm()), rel=1e-5)
        rest = dense - fit.factors.up @ fit.factors.down
        assert float(rest.norm()) == pytest.approx(fit.error, rel=1e-4)


def test_energy_keeps_its_share_of_the_squared_norm() -> None:
    dense = torch.randn(16, 24, generator=torch.Generator().manual_seed(3))
    fit = lowrank.factored(dense, energy=0.9)
    less = lowrank.factored(dense, rank=fit.factors.rank - 1)
    assert 1 - fit.share**2 >= 0.9 > 1 - less.share**2


def test_a_small_rank_of_a_large_matrix_is_searched_and_its_error_measured() -> None:
    dense = matrix(1100, 1200, 6) + 0.01 * torch.randn(1100, 1200, generator=torch.Generator().manual_seed(4))
    fit = lowrank.factored(dense, rank=6)
    values = torch.linalg.svdvals(dense)
    assert fit.error == pytest.approx(float(values[6:].double().norm()), rel=1e-3)
    state = torch.random.get_rng_state()
    lowrank.factored(dense, rank=6)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("size", "said"),
    [({"rank": 0}, "a wrong rank"), ({"energy": 1.5}, "a wrong energy"), ({"rank": 2, "energy": 0.5}, "exclude")],
)
def test_sizes_that_cannot_be(size: dict[str, Any], said: str) -> None:
    with pytest.raises(adapters.RequestError, match=said):
        lowrank.factored(torch.ones(3, 3), **size)


def test_a_change_of_nothing_has_rank_one_and_no_error() -> None:
    fit = lowrank.factored(torch.zeros(4, 5))
    assert (fit.factors.rank, fit.error, fit.share) == (1, 0.0, 0.0)


# ---------------------------------------------------------------------- refusals


def test_adapters_of_different_backbones_are_told_apart(tmp_path: Path) -> None:
    _, one = adapter(tmp_path / "one", "bert", "lora")
    tiny.folder("bert", tmp_path / "two" / "base", seed=7)
    _, two = adapter(tmp_path / "two", "bert", "lora")
    with pytest.raises(adapters.BackboneError, match="different backbones"):
        changes.refuse_apart(changes.read(one), [changes.read(two)])
    changes.refuse_apart(changes.read(one), [changes.read(one)])


def test_a_changed_base_is_refused_as_it_is_read(tmp_path: Path) -> None:
    _, folder = adapter(tmp_path, "bert", "freeze")
    tiny.folder("bert", tmp_path / "other", seed=7)
    found = changes.read(folder)
    base = changes.originals(found, tmp_path / "other")
    name = next(name for name in found.inside if name.endswith("dense.weight"))
    with pytest.raises(adapters.BackboneError, match="not the backbone"):
        base.delta(name, found.edits[name])


def test_tensors_that_no_adapter_holds_are_refused(tmp_path: Path) -> None:
    _, folder = adapter(tmp_path, "bert", "lora")
    found = changes.read(folder)
    base = changes.originals(found)
    made = {"by": "test", "from": []}
    for whole in ({}, {"nowhere.weight": torch.zeros(2)}):
        with pytest.raises(adapters.RequestError):
            remake.write(tmp_path / "out", found, base.folder, factors={}, whole=whole, made=made)
    assert not (tmp_path / "out").exists()
