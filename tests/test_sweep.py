"""Many settings over one backbone: what is tried, that the backbone comes back, that results are kept and go on."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import adapters
from adapters import adapt as _adapt  # noqa: F401
from adapters import attempts, axes, campaign, search, solve, standings, storage, trials, watermark
from adapters.attempts import Ground
from adapters.axes import Axis
from adapters.errors import AdaptersError, FolderError, MissingPackageError, RequestError
from adapters.lent import Lent
from adapters.standings import Spread, Standing
from adapters.sweep import Sweep

PARTS = ("validation", "test")
QUICK = {"num_train_epochs": 2, "per_device_train_batch_size": 16, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.folder("bert", tmp_path_factory.mktemp("base") / "bert")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("rows") / "rows.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["text", "label"])
        writer.writeheader()
        writer.writerows(tiny.rows(60))
    return str(file)


@pytest.fixture
def recipe(base: str, rows: str) -> dict[str, Any]:
    return {"model": base, "data": rows, "validation": 0.2, "test": 0.2, "train": dict(QUICK)}


def made(recipe: dict[str, Any], folder: Path, **changes: Any) -> Sweep:
    return Sweep.make({"recipe": recipe, "output": str(folder / "sweep"), **changes})


def space(recipe: dict[str, Any], **over: Any) -> trials.Space:
    return Sweep.make({"recipe": recipe, "over": over}).space()


# ---------------------------------------------------------------------- what varies


def test_a_range_is_read_and_drawn() -> None:
    rate, rank, share = axes.axis("a", "1e-5..1e-3"), axes.axis("b", "4..64"), axes.axis("c", "0.1..0.3")
    assert (rate.log, rank.log, share.log) == (True, True, False)
    generator = random.Random(0)
    drawn = [rate.draw(generator) for _ in range(400)]
    assert all(1e-5 <= value <= 1e-3 for value in drawn)
    assert 0.4 < sum(value < 1e-4 for value in drawn) / 400 < 0.6, "half of the draws lie below the geometric middle"
    assert {type(rank.draw(generator)) for _ in range(5)} == {int}
    assert axes.parse("train.learning_rate=1e-5..1e-3") == ("train.learning_rate", "1e-5..1e-3")
    assert axes.parse("options.r=4,8") == ("options.r", [4, 8])
    assert axes.parse("options.layers_to_transform=[0,1],[2]") == ("options.layers_to_transform", [[0, 1], [2]])


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("options.r", "not key=value"),
        ("=4", "not key=value"),
        ("options.r=", "nothing to try"),
        ("options.r=4,4", "stands twice"),
        ("options.r=8..4", "without an inside"),
        ("options.r=4..x", "not a range"),
        ("options.r=4,5..9", "beside other values"),
    ],
)
def test_values_that_are_none(entry: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        axes.axis(*axes.parse(entry))


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"options.rr": [4]}, "Known: .*'?r"),
        ({"options.lora_rank": [4]}, "The name here is 'r'"),
        ({"r": [4]}, "The key is 'options.r'"),
        ({"stratgy": ["lora"]}, "Did you mean 'strategy'"),
        ({"strategy": ["lora", "lroa"]}, "Did you mean 'lora'"),
        ({"seed": [1, 2]}, "--seeds 3"),
        ({"data": ["a", "b"]}, "cannot be compared"),
        ({"train": [1]}, "train.NAME"),
        ({"model.r": ["a"]}, "no keys of its own"),
        ({"options.r": []}, "nothing to try"),
        ({"stratgy": ["lora"], "optoins.r": [3]}, "stratgy.*optoins"),
    ],
)
def test_keys_that_are_none(recipe: dict[str, Any], over: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        Sweep.make({"recipe": recipe, "over": over})


def test_a_training_setting_that_does_not_exist(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="Did you mean 'learning_rate'"):
        made(recipe, tmp_path, over={"train.lerning_rate": [1e-3]}).run()
    assert not (tmp_path / "sweep").exists()


def test_what_does_not_apply_is_left_out_and_said(recipe: dict[str, Any]) -> None:
    found = space(
        {**recipe, "options": {"max_length": 12}},
        **{"strategy": ["probe", "freeze", "lora"], "options.r": [2, 4], "train.learning_rate": [1e-3, 1e-2]},
    )
    settings = found.settings(axes.product(found.over))
    names = [str(one) for one in settings]
    assert names[:3] == ["probe", "freeze learning_rate=0.001", "freeze learning_rate=0.01"]
    assert len(names) == 1 + 2 + 4
    said = " ".join(found.check())
    assert "options.r is left out for probe, freeze" in said
    assert "train.learning_rate is left out for probe, which is solved" in said
    assert "train.num_train_epochs of the recipe is left out for probe" in said
    probe = settings[0].recipe
    assert set(probe.train) == {"per_device_train_batch_size"}
    assert probe.options == {"max_length": 12}


def test_a_probe_alone_is_stepped_where_that_is_asked_for(recipe: dict[str, Any]) -> None:
    found = space({**recipe, "strategy": "probe"}, **{"train.learning_rate": [1e-3, 1e-2]})
    assert [dict(one.values) for one in found.settings(axes.product(found.over))] == [
        {"train.learning_rate": 1e-3},
        {"train.learning_rate": 1e-2},
    ]


def test_options_of_the_recipe_that_another_strategy_lacks(recipe: dict[str, Any]) -> None:
    found = space({**recipe, "options": {"r": 2}}, strategy=["lora", "freeze"])
    assert [one.recipe.options for one in found.settings(axes.product(found.over))] == [{"r": 2}, {}]


def test_seeds_move_training_and_not_the_split(recipe: dict[str, Any]) -> None:
    one = space(recipe).setting({})
    assert (one.seeded(3, split=False).seed, one.seeded(3, split=False).split_seed) == (3, 0)
    assert one.seeded(0, split=False).split_seed is None
    assert one.seeded(3, split=True).split_seed is None
    assert trials.chosen_seeds(3, 5) == [5, 6, 7]
    for seeds in (0, [], [1, 1]):
        with pytest.raises(RequestError, match="no seeds"):
            trials.chosen_seeds(seeds, 0)


def test_a_random_draw_is_the_same_for_the_same_seed(recipe: dict[str, Any]) -> None:
    found = space(recipe, **{"strategy": ["lora", "bitfit"], "train.learning_rate": "1e-4..1e-2"})
    first, _ = search.listed(found, "random", 5, None, 7)
    again, _ = search.listed(found, "random", 5, None, 7)
    other, _ = search.listed(found, "random", 5, None, 8)
    assert [one.key for one in first] == [one.key for one in again] != [one.key for one in other]
    few, said = search.listed(space(recipe, **{"options.r": [2, 4]}), "random", 5, None, 0)
    assert len(few) == 2
    assert "no more than 2" in said
    with pytest.raises(RequestError, match="--search random"):
        search.listed(found, "grid", None, None, 0)


def test_a_grid_of_thousands_is_refused_with_its_time(recipe: dict[str, Any], tmp_path: Path) -> None:
    over = {"options.r": list(range(1, 41)), "train.learning_rate": [10**-power for power in range(1, 31)]}
    with pytest.raises(RequestError, match=r"3,600 trials.*2\.5 days.*a guess.*--limit 3600"):
        made(recipe, tmp_path, over=over, seeds=3).run()
    drawn, said = search.listed(space(recipe, **over), "grid", None, 10, 0)
    assert len(drawn) == 10
    assert "of 1200 settings 10 are drawn" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"search": "random", "over": {"options.r": [1]}}, "--trials N"),
        ({"search": "random", "trials": 3}, "nothing to choose among"),
        ({"trials": 3}, "a grid has as many"),
        ({"over": {"options.r": "2..8"}}, "no place for a range"),
    ],
)
def test_a_search_that_cannot_be(recipe: dict[str, Any], tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        made(recipe, tmp_path, **changes).run()


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"sedes": 3}, "Did you mean 'seeds'"),
        ({"strategy": "lora"}, "It belongs to the recipe"),
        ({"search": "bayes"}, "search"),
        ({"trials": 0}, "trials"),
        ({"keep": "some"}, "keep"),
    ],
)
def test_a_document_that_cannot_be(recipe: dict[str, Any], document: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        Sweep.make({"recipe": recipe, **document})


def test_optuna_that_is_not_there_names_the_extra(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingPackageError, match=r"holdfast\[sweep\]"):
        made(recipe, tmp_path, search="optuna", trials=2, over={"options.r": [1, 2]}).run()


# ---------------------------------------------------------------------- the backbone


def opener(base: str) -> Lent:
    from adapters.backbones import open_model

    task = adapters.TASKS["text-classification"](labels=tiny.LABELS)
    return Lent(lambda: open_model(base, task, {}, None), Path(base), print)


def bytes_of(net: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("strategy", ["probe", "freeze", "full", "bitfit", "lora", "dora", "ia3"])
def test_the_backbone_comes_back(base: str, strategy: str) -> None:
    lent = opener(base)
    for seed in (0, 1):
        fresh = adapters.adapt(base, strategy, labels=tiny.LABELS, seed=seed)
        adapted = adapters.adapt(lent, strategy, labels=tiny.LABELS, seed=seed)
        assert adapted.fingerprint == fresh.fingerprint
        assert adapted.trained == fresh.trained
        for name, tensor in fresh.model.state_dict().items():
            assert torch.equal(adapted.model.state_dict()[name], tensor), name
        tiny.shake(adapted)
        assert lent.give_back(adapted.strategy.strip) == ""
    assert lent.opened == 1
    net, _, _ = lent.begin()
    plain = adapters.adapt(base, "probe", labels=tiny.LABELS).model
    kept = {n: t for n, t in plain.state_dict().items() if not n.startswith("classifier")}
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "gpt2", "t5", "vit", "modernbert"])
def test_new_tensors_begin_as_in_a_load_of_their_own(kind: str, tmp_path: Path) -> None:
    from adapters.backbones import open_model

    folder = tiny.folder(kind, tmp_path / kind)
    name = "image-classification" if kind == "vit" else "text-classification"
    task = adapters.TASKS[name](labels=tiny.LABELS)
    lent = Lent(lambda: open_model(folder, task, {}, None), Path(folder), print)
    for seed in (3, 4, 3):
        fresh = adapters.adapt(folder, "lora", task=name, labels=tiny.LABELS, seed=seed)
        adapted = adapters.adapt(lent, "lora", task=name, labels=tiny.LABELS, seed=seed)
        state, other = adapted.state(), fresh.state()
        assert state.keys() == other.keys()
        assert all(torch.equal(state[name], other[name]) for name in other)
        assert lent.give_back(adapted.strategy.strip) == ""
    assert lent.opened == 1


def test_a_backbone_that_does_not_come_back_is_opened_again(base: str) -> None:
    lent = opener(base)
    adapted = adapters.adapt(lent, "lora", labels=tiny.LABELS)
    why = lent.give_back(None)  # nobody took the adapters out
    assert "modules are not those" in why
    again = adapters.adapt(lent, "probe", labels=tiny.LABELS)
    assert again.model is not adapted.model
    assert lent.opened == 2
    with pytest.raises(adapters.BackboneError, match="lent already"):
        lent.begin()


def test_a_tokenizer_is_lent_as_it_was_read(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is copied again where the last borrower changed it, and only there; a saved adapter brings its own."""
    from transformers import PreTrainedTokenizerBase

    from adapters import lent as room

    copies: list[Any] = []
    real = room.copy.deepcopy

    def copying(one: Any, *memo: Any) -> Any:
        copies.append(one)
        return real(one, *memo)

    monkeypatch.setattr(room.copy, "deepcopy", copying)
    lent = opener(base)

    def borrowed() -> Any:
        adapted = adapters.adapt(lent, "probe", labels=tiny.LABELS)
        assert lent.give_back(adapted.strategy.strip) == ""
        return adapted.processor

    def counted() -> int:
        return sum(isinstance(one, PreTrainedTokenizerBase) for one in copies)

    first = borrowed()
    said = first.backend_tokenizer.to_str()
    assert borrowed() is first
    assert counted() == 1
    adapted = adapters.adapt(lent, "probe", labels=tiny.LABELS)
    adapters.save(adapted, tmp_path / "a")
    adapted.processor("changed", padding="max_length", max_length=9, truncation=True)
    assert adapted.processor.backend_tokenizer.to_str() != said
    lent.give_back(adapted.strategy.strip)
    second = borrowed()
    assert second is not first
    assert second.backend_tokenizer.to_str() == said
    assert borrowed() is second
    second.add_tokens(["brandnew"])  # by a borrower who has given it back
    third = borrowed()
    assert third is not second
    assert len(third) == len(second) - 1
    third.padding_side = "left"
    assert borrowed() is not third
    before = counted()
    opened = storage.load(tmp_path / "a", lent)  # type: ignore[arg-type]
    assert opened.processor is not lent._copy[0]  # type: ignore[index]
    assert opened.processor.name_or_path == str(tmp_path / "a")
    assert counted() == before


def test_memory_is_watched() -> None:
    with watermark.watched() as small:
        pass
    with watermark.watched() as large:
        held = torch.ones(30_000_000)
        held += 1
    del held
    with watermark.watched() as after:
        pass
    assert large.bytes - small.bytes > 100_000_000
    assert large.bytes - after.bytes > 100_000_000, "the mark is set back"


# ---------------------------------------------------------------------- a sweep


def test_a_sweep(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.bert.modeling_bert import BertLayer

    lowest: dict[str, Any] = {"calls": 0}
    real, forward = attempts.open_model, BertLayer.forward

    def opening(*args: Any) -> Any:
        found = real(*args)
        lowest["block"] = found[0].base_model.encoder.layer[0]
        return found

    def counting(self: Any, *args: Any, **named: Any) -> Any:
        lowest["calls"] += self is lowest["block"]
        return forward(self, *args, **named)

    monkeypatch.setattr(attempts, "open_model", opening)
    monkeypatch.setattr(BertLayer, "forward", counting)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said: list[str] = []
    sweep = made(
        recipe,
        tmp_path,
        over={"strategy": ["probe", "freeze", "lora"], "options.layers": [1, 2], "options.r": [2]},
        seeds=2,
    )
    trained: list[int] = []
    original = attempts.Trainer.train

    def watched(self: Any, *args: Any, **named: Any) -> Any:
        before = lowest["calls"]
        result = original(self, *args, **named)
        trained.append(lowest["calls"] - before)
        return result

    monkeypatch.setattr(attempts.Trainer, "train", watched)
    results = sweep.run(said.append)
    output = tmp_path / "sweep"
    assert results["backbone_opened"] == 1
    assert [len(one["seeds"]) for one in results["standings"]] == [2, 2, 2, 2]
    assert {one["name"] for one in results["standings"]} == {"probe", "freeze layers=1", "freeze layers=2", "lora r=2"}
    # probe, freeze 1, freeze 2, lora; then the second seed, whose frozen parts are kept by the first.
    assert len(trained) == 8
    for first, second in zip(trained[1:3], trained[5:7], strict=True):
        assert second < first, "what is below the cut was not computed again"
    for one in results["standings"]:
        assert one["test"] is not None
        assert one["trained_parameters"] > 0
        assert one["adapter_bytes"] > 0
        assert one["peak_bytes"] > 1e6
    assert results["verdict"].startswith("The probe")
    assert results["recommended"] in {one["name"] for one in results["standings"]}
    assert sum("trial" in line for line in said) >= 8
    # the best adapter opens, and answers as its row says
    best = adapters.load(output / "best")
    row = next(one for one in results["standings"] if one["name"] == results["recommended"])
    parts = Ground(sweep.recipe, lambda line: None).parts(sweep.recipe)
    assert adapters.evaluate(best, parts["test"])["accuracy"] in row["test"]["values"]
    assert {"sweep.md", "sweep.csv", "sweep.json", "sweep.yaml", "best", "best.yaml"} <= {
        p.name for p in output.iterdir()
    }
    assert not list(output.glob("trials/*/adapter"))
    assert json.loads((output / "sweep.json").read_text())["verdict"] == results["verdict"]
    table = list(csv.DictReader((output / "sweep.csv").open()))
    assert len(table) == 4
    assert float(table[0]["test_accuracy"]) == pytest.approx(results["standings"][0]["test"]["mean"])
    if importlib.util.find_spec("matplotlib"):
        assert (output / "sweep.png").stat().st_size < 200_000
        assert "<svg" in (output / "sweep.svg").read_text()[:600]
    # the same again trains nothing and says the same
    before = len(trained)
    again = sweep.run(said.append)
    assert len(trained) == before
    assert again["table"] == results["table"]
    assert again["trials"] == {"planned": 8, "made": 0, "known": 8}


def test_places_to_read_do_not_take_each_others_features(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept features are those of a trial's own pooling and layer: as good as none kept at all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    over = {"options.pooling": ["mean", "first"], "options.layer": [1, 3]}
    numbers = []
    for cache in (True, False):
        given = {**recipe, "strategy": "probe", "train": {"prefix_cache": cache}}
        found = made(given, tmp_path / str(cache), over=over).run(lambda line: None)
        notes = [
            note
            for folder in (tmp_path / str(cache) / "sweep" / "trials").iterdir()
            for note in (trials.read_result(folder) or {})["notes"]
            if "solved" in note
        ]
        numbers.append([sorted(notes), *({o["name"]: o[part]["mean"] for o in found["standings"]} for part in PARTS)])
    assert len(numbers[0][0]) == 4
    assert numbers[0] == numbers[1]


def test_what_many_probes_share_is_computed_once(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials with the same features and loss solve once; validation and test rows pass the frozen blocks once."""
    from transformers.models.bert.modeling_bert import BertLayer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    solved, trial = [], {"rows": 0}
    chosen, forward = solve.chosen, BertLayer.forward

    def counted(*args: Any, **named: Any) -> Any:
        solved.append(named["seed"])
        return chosen(*args, **named)

    def passing(self: Any, hidden_states: Any, *args: Any, **named: Any) -> Any:
        trial["rows"] += len(hidden_states)
        return forward(self, hidden_states, *args, **named)

    monkeypatch.setattr(solve, "chosen", counted)
    monkeypatch.setattr(BertLayer, "forward", passing)
    passed = []
    for step in ("trained", "tested"):
        original = getattr(attempts, step)

        def watched(*args: Any, made: Any = original) -> Any:
            before = trial["rows"]
            found = made(*args)
            passed.append(trial["rows"] - before)
            return found

        monkeypatch.setattr(attempts, step, watched)
    given = {**recipe, "strategy": "probe", "train": {}, "options": {"pooling": "mean", "layer": 2}}
    sweep = made(given, tmp_path, over={"options.label_smoothing": [0.0, 0.1]}, seeds=3, keep="all")
    found = sweep.run(lambda line: None)
    assert len(solved) == 2, "once for each loss"
    assert len(passed) == 12
    assert passed[0] > 2 * 36, "two blocks run"
    assert max(passed[1:6]) < passed[0] / 2
    # What is left is where loading finds out where the head reads, whatever the number of rows.
    assert max(passed[7:]) <= passed[6] - 2 * 12
    # What was shared is what each would have had alone.
    results = [trials.read_result(folder) for folder in (tmp_path / "sweep" / "trials").iterdir()]
    one = next(result for result in results if result and result["seed"] == 2)
    alone = adapters.Recipe(**{**one["recipe"], "output": str(tmp_path / "alone")}).run(lambda line: None)
    assert alone["validation"]["accuracy"] == one["validation"]
    assert alone["test"] == pytest.approx(one["test"], rel=1e-5)
    there = adapters.load(tmp_path / "sweep" / "trials" / one["key"] / "adapter").state()
    assert all(torch.equal(there[name], tensor) for name, tensor in adapters.load(tmp_path / "alone").state().items())
    assert found["standings"][0]["test"] is not None


def test_a_trial_is_the_run_of_its_recipe(recipe: dict[str, Any], tmp_path: Path) -> None:
    sweep = made(recipe, tmp_path, over={"strategy": ["full", "lora"]}, seeds=[1, 2], keep="all")
    sweep.run(lambda line: None)
    found = [trials.read_result(folder) for folder in (tmp_path / "sweep" / "trials").iterdir()]
    result = next(one for one in found if one and one["strategy"] == "lora" and one["seed"] == 2)
    assert result["recipe"]["split_seed"] == 0
    alone = adapters.Recipe(**{**result["recipe"], "output": str(tmp_path / "alone")}).run(lambda line: None)
    assert alone["validation"]["accuracy"] == result["validation"]
    assert alone["test"] == pytest.approx(result["test"])
    there = adapters.load(tmp_path / "sweep" / "trials" / result["key"] / "adapter").state()
    here = adapters.load(tmp_path / "alone").state()
    assert all(torch.equal(there[name], here[name]) for name in here)


def test_an_interrupted_sweep_goes_on(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = {"strategy": ["probe", "lora"]}
    whole = made(recipe, tmp_path / "whole", over=over, seeds=2).run(lambda line: None)
    original = attempts.Trainer.train
    begun: list[str] = []

    def stopping(self: Any, *args: Any, **named: Any) -> Any:
        begun.append(self.adapted.strategy.name)
        if len(begun) == 4:
            import signal

            from transformers import TrainerCallback

            class Stop(TrainerCallback):
                def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                    if state.global_step == 3:
                        signal.raise_signal(signal.SIGINT)

            self.add_callback(Stop())
        return original(self, *args, **named)

    monkeypatch.setattr(attempts.Trainer, "train", stopping)
    said: list[str] = []
    sweep = made(recipe, tmp_path / "parts", over=over, seeds=2)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(said.append, onward="adapters sweep AGAIN")
    assert said[-1] == "interrupted: 3 of 4 trials are done and kept; go on with adapters sweep AGAIN"
    parts = tmp_path / "parts" / "sweep"
    assert len(list(parts.glob("trials/*/result.json"))) == 3
    assert list(parts.glob("trials/*/run/checkpoint-*")), "the trial that was stopped has its checkpoint"
    results = sweep.run(said.append)
    assert begun[4:] == ["lora"], "it goes on with the trial that was stopped"
    assert results["trials"] == {"planned": 4, "made": 1, "known": 3}
    assert not list(parts.glob("trials/*/run"))
    numbers = [
        [
            {name: one[name] for name in ("name", "validation", "test", "trained_parameters", "adapter_bytes")}
            for one in found["standings"]
        ]
        for found in (whole, results)
    ]
    assert numbers[0] == numbers[1]
    assert (results["recommended"], results["verdict"]) == (whole["recommended"], whole["verdict"])


def test_a_failed_trial_is_a_row(recipe: dict[str, Any], tmp_path: Path) -> None:
    said: list[str] = []
    sweep = made(
        recipe,
        tmp_path,
        over={"strategy": ["lora", "freeze"], "options.layers": [1, 9], "train.learning_rate": [5e-3, 1e30]},
        limit=9,
    )
    results = sweep.run(said.append)
    rows = {one["name"]: one for one in results["standings"]}
    good = [name for name, one in rows.items() if one["validation"] is not None]
    assert sorted(good) == ["freeze layers=1 learning_rate=0.005", "lora learning_rate=0.005"]
    assert "not finite" in rows["lora learning_rate=1e+30"]["failed"][0]
    assert "9" in rows["freeze layers=9 learning_rate=0.005"]["failed"][0]
    assert results["backbone_opened"] == 1, "failures leave the backbone as it was"
    assert "failed: lora learning_rate=1e+30" in (tmp_path / "sweep" / "sweep.md").read_text()
    assert results["recommended"] in good
    before = sorted((tmp_path / "sweep" / "trials").iterdir())
    again = sweep.run(said.append, retry=True)
    assert again["trials"]["made"] == len(rows) - 2
    assert sorted((tmp_path / "sweep" / "trials").iterdir()) == before


def test_nothing_but_failures(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"every trial failed.*lora_alpha|every trial failed.*r "):
        made(recipe, tmp_path, over={"options.r": [-1, -2]}).run(lambda line: None)
    assert "failed" in (tmp_path / "sweep" / "sweep.md").read_text()


def test_a_widened_sweep_tries_what_is_new(recipe: dict[str, Any], tmp_path: Path) -> None:
    first = made(recipe, tmp_path, over={"strategy": ["probe", "bitfit"]}).run(lambda line: None)
    assert first["trials"]["made"] == 2
    second = made(recipe, tmp_path, over={"strategy": ["probe", "bitfit", "lora"]}).run(lambda line: None)
    assert second["trials"] == {"planned": 3, "made": 1, "known": 2}
    adapters.load(tmp_path / "sweep" / "best")


def test_other_rows_are_other_trials(recipe: dict[str, Any], tmp_path: Path, rows: str) -> None:
    made(recipe, tmp_path, over={"strategy": ["probe"]}).run(lambda line: None)
    text = Path(rows).read_text()
    other = tmp_path / "other.csv"
    other.write_text(text + "refund the money back,b\n")
    again = made({**recipe, "data": str(other)}, tmp_path, over={"strategy": ["probe"]}).run(lambda line: None)
    assert again["trials"] == {"planned": 1, "made": 1, "known": 0}
    copy = tmp_path / "copy.csv"
    copy.write_text(text)
    same = made({**recipe, "data": str(copy)}, tmp_path, over={"strategy": ["probe"]}).run(lambda line: None)
    assert same["trials"] == {"planned": 1, "made": 0, "known": 1}


def test_a_metric(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="Did you mean 'macro_f1'"):
        made(recipe, tmp_path, metric="macrof1").run(lambda line: None)
    results = made(recipe, tmp_path, metric="loss", over={"strategy": ["bitfit", "lora"]}).run(lambda line: None)
    assert results["greater_is_better"] is False
    losses = [one["validation"]["mean"] for one in results["standings"]]
    assert losses == sorted(losses)


def test_random_search(recipe: dict[str, Any], tmp_path: Path) -> None:
    over = {"strategy": ["lora", "bitfit"], "train.learning_rate": "1e-4..1e-2", "options.r": "1..4"}
    results = made(recipe, tmp_path, search="random", trials=2, over=over).run(lambda line: None)
    assert len(results["standings"]) == 2


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs optuna")
def test_optuna(recipe: dict[str, Any], tmp_path: Path) -> None:
    over = {"strategy": ["lora", "bitfit"], "train.learning_rate": "1e-4..1e-2", "options.r": [1, 2]}
    sweep = made(recipe, tmp_path, search="optuna", trials=3, over=over)
    first = sweep.run(lambda line: None)
    assert first["trials"]["planned"] == 3
    again = sweep.run(lambda line: None)
    assert again["trials"]["made"] == 0, "the same proposals, all of them known"
    assert again["table"] == first["table"]


def test_a_folder_of_somebody_else(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "thesis.txt").write_text("x")
    with pytest.raises(FolderError, match=r"thesis\.txt"):
        made(recipe, tmp_path).run()


def test_files(recipe: dict[str, Any], tmp_path: Path) -> None:
    import yaml

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "sweep.yaml").write_text(
        yaml.safe_dump({"recipe": "recipe.yaml", "over": {"options.r": [2, 4]}, "seeds": 2, "output": "here"})
    )
    alone = Sweep.read(tmp_path / "recipe.yaml", {"options.r": [2]}, {"train.learning_rate": 1e-3}, seeds=3)
    assert (alone.seeds, alone.over, alone.recipe.train["learning_rate"]) == (3, {"options.r": [2]}, 1e-3)
    both = Sweep.read(tmp_path / "sweep.yaml", {"strategy": ["lora", "dora"]}, output="there")
    assert both.over == {"options.r": [2, 4], "strategy": ["lora", "dora"]}
    assert (both.seeds, both.output) == (2, "there")
    with pytest.raises(RequestError, match="no such file"):
        Sweep.read(tmp_path / "none.yaml")


# ---------------------------------------------------------------------- side by side


def row(name: str, values: list[float], size: int, seconds: float = 1.0, solved: bool = False) -> Standing:
    count = len(values)
    return Standing(
        name=name,
        strategy=name,
        solved=solved,
        seeds=tuple(range(count)),
        validation=Spread.of(values),
        test=None,
        parameters=size // 4,
        bytes=size,
        seconds=seconds,
        peak=1,
        failed=() if values else ("seed 0: no",),
        trials=tuple(map(str, range(count))),
    )


def test_the_pareto_front() -> None:
    table = [row("a", [0.9], 100), row("b", [0.8], 10), row("c", [0.8], 50), row("d", [0.7], 20), row("e", [], 1)]
    assert standings.front(table, "bytes", greater=True) == {"a", "b"}
    assert standings.front(table, "seconds", greater=True) == {"a"}
    assert standings.front(table, "bytes", greater=False) == {"d", "b"}
    assert standings.front([row("a", [0.9], 5), row("b", [0.9], 5)], "bytes", greater=True) == {"a", "b"}


def test_what_is_recommended() -> None:
    table = [row("big", [0.92, 0.90], 1000), row("near", [0.91, 0.88], 100), row("far", [0.70, 0.71], 10)]
    taken = standings.recommended(table, greater=True)
    assert taken is not None
    assert taken.name == "near"
    one_seed = [row("big", [0.92], 1000), row("near", [0.91], 100)]
    taken = standings.recommended(one_seed, greater=True)
    assert taken is not None
    assert taken.name == "big", "where no noise is known, the best is taken"
    assert standings.recommended([row("e", [], 1)], greater=True) is None


@pytest.mark.parametrize(
    ("probe", "other", "said"),
    [
        ([0.90, 0.90], [0.91, 0.89], "probe was enough"),
        ([0.89, 0.89], [0.92, 0.88], "would have been enough within the noise"),
        ([0.80, 0.80], [0.91, 0.90], "would not have been enough"),
        ([0.80], [0.91], "the noise is not known"),
        ([], [0.9], "not known: it failed"),
        (None, [0.9], "none was tried"),
    ],
)
def test_the_sentence_on_the_probe(probe: list[float] | None, other: list[float], said: str) -> None:
    table = [row("lora", other, 1000)] + ([row("probe", probe, 10, solved=True)] if probe is not None else [])
    assert said in standings.verdict(table, "accuracy", greater=True)


def test_losses_count_downwards() -> None:
    table = [row("lora", [0.3, 0.4], 1000), row("probe", [0.36, 0.36], 10, solved=True)]
    assert "within the noise" in standings.verdict(table, "loss", greater=False)
    assert [one.name for one in standings.ordered(table, greater=False)] == ["lora", "probe"]


def test_numbers_for_people() -> None:
    assert [standings.sized(n) for n in (12, 18_700, 7_710_000, 2_000_000_000)] == [
        "12 B",
        "18.7 kB",
        "7.71 MB",
        "2 GB",
    ]
    assert math.isclose(Spread.of([1.0, 3.0]).deviation, math.sqrt(2))  # type: ignore[union-attr]
    assert str(Axis("options.r", (1, 2))) == "options.r 1, 2"
    assert isinstance(campaign.MANY, int)
    assert issubclass(FolderError, AdaptersError)
