"""Rows prepared by several processes are those of one; what each computed of them serves all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from many import Ended

import adapters
from adapters import jointly, ranks


def kinds() -> dict[str, tuple[Any, Any]]:
    """Of each kind of preparation an adapted model and its rows, some of them too long, one with special letters."""
    rows = tiny.rows(45)
    rows[7]["text"] = rows[40]["text"] = " ".join(rows[7]["text"] for _ in range(12))
    words, texts = tiny.tokenizer(), [{"text": row["text"]} for row in rows]
    made = {
        "labels": (adapters.adapt(tiny.model("bert"), "probe", processor=words, labels=list(tiny.LABELS)), rows),
        "masks": (adapters.adapt(tiny.model("bert", auto="AutoModelForMaskedLM"), "lora", task="masked-lm",
                                 processor=words), texts),
        "blocks": (adapters.adapt(tiny.model("llama", auto="AutoModelForCausalLM"), "lora", task="causal-lm",
                                  processor=words), texts),
        "texts": (adapters.adapt(tiny.model("llama", auto="AutoModelForCausalLM"), "lora", task="causal-lm",
                                 processor=words, packing=False), texts),
    }  # fmt: skip
    return made


def preparing(apart: bool) -> dict[str, Any]:
    """In each process: what it has of every kind, how much of it is in memory, and how many rows it prepared."""
    from datasets import Dataset

    if apart:  # no two processes have a disk in common
        os.environ["XDG_CACHE_HOME"] += f"/{ranks.rank()}"
    found: dict[str, Any] = {}
    for name, (adapted, rows) in kinds().items():
        raw = Dataset.from_list(rows)
        own: list[int] = []
        inner = type(adapted.task).prepare

        def counted(task: Any, some: Any, *args: Any, inner: Any = inner, own: Any = own, **kwargs: Any) -> Any:
            own.append(len(some))
            return inner(task, some, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(adapted.task), "prepare", counted)
            made, said = jointly.prepared(raw, adapted)
        whole, remarks = adapted.task.prepare(raw, adapted.processor, adapted.model, labelled=True)
        assert made.features == whole.features
        assert made.to_list() == whole.to_list()
        assert said == remarks
        found[name] = [sum(own), len(made.cache_files), remarks]
    broken = Dataset.from_list([*tiny.rows(30), {"text": " ", "label": "a"}, *tiny.rows(3)])
    with pytest.raises(adapters.DataError, match=r"row 30, column 'text'"):
        jointly.prepared(broken, kinds()["labels"][0])
    return found


def test_each_process_prepares_its_part(many: Callable[..., list[Ended]], tmp_path: Path) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path / "shared")}
    ended = [one.gave for one in many("test_many_rows:preparing", 3, False, more=cache)]
    for name in ("labels", "masks", "texts"):
        assert [gave[name][0] for gave in ended] == [15, 15, 15]
        assert all(gave[name][1] == 3 for gave in ended)  # all read the files of all
        assert "2 of 45 texts (4.4 %)" in ended[0][name][2][0]
    assert sorted(gave["blocks"][0] for gave in ended) == [0, 0, 45]  # once for all
    cache = {"XDG_CACHE_HOME": str(tmp_path / "own")}
    for one in many("test_many_rows:preparing", 2, True, more=cache):
        assert [one.gave[name][0] for name in ("labels", "blocks")] == [45, 45]


def test_many_rows_are_prepared_in_parts_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jointly, "PART", 20)
    adapted, rows = kinds()["labels"]
    raw = Dataset.from_list(rows)
    made, said = jointly.prepared(raw, adapted)
    whole, remarks = adapted.task.prepare(raw, adapted.processor, adapted.model, labelled=True)
    assert made.to_list() == whole.to_list()
    assert said == remarks != []
    assert [Path(file["filename"]).name for file in made.cache_files] == ["0.arrow", "20.arrow", "40.arrow"]
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")  # and where no folder can be written, in memory
    again, _ = jointly.prepared(raw, adapted)
    assert again.to_list() == whole.to_list()
    assert again.cache_files == []


def cached(base: str, place: str, texts: list[dict[str, str]], settings: dict[str, Any]) -> dict[str, Any]:
    """A run in each process: its losses, and how many rows this process took through the frozen part by itself."""
    from test_trainer import trainer_for

    from adapters import features, prefix

    own = {"prefix": 0, "features": 0}
    run, read = prefix.Prefix.run, features.Extract.batch

    def ran(self: Any, inputs: Any) -> Any:
        own["prefix"] += len(inputs["input_ids"])
        return run(self, inputs)

    def reading(self: Any, inputs: Any) -> Any:
        own["features"] += len(inputs["input_ids"])
        return read(self, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix.Prefix, "run", ran)
        patch.setattr(features.Extract, "batch", reading)
        held = tiny.rows(20, seed=1)
        arguments = {"num_train_epochs": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no"}
        adapted = adapters.adapt(base, "freeze", labels=list(tiny.LABELS))
        more = {"train_dataset": texts, "eval_dataset": held, "args": {**arguments, **settings}}
        trainer = trainer_for(Path(place), adapted, **more)
        trainer.train()
    losses = [entry[name] for entry in trainer.state.log_history for name in ("loss", "eval_loss") if name in entry]
    return {"losses": losses, **own}


def caching(base: str, place: str, texts: list[dict[str, str]]) -> list[Any]:
    """Without a cache, with an empty one, and with what that run has left."""
    plain = cached(base, f"{place}/plain", texts, {"prefix_cache": False})
    return [plain, *[cached(base, f"{place}/{name}", texts, {}) for name in ("first", "second")]]


def test_what_each_computed_serves_all(many: Callable[..., list[Ended]], tmp_path: Path) -> None:
    texts = tiny.rows(600)
    more = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    base = tiny.folder("bert", tmp_path / "base")
    ended = [one.gave for one in many("test_many_rows:caching", 2, base, tmp_path, texts, more=more)]
    for plain, first, second in ended:
        assert plain["prefix"] == 0
        assert first["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        assert second["losses"] == first["losses"]
        assert second["features"] == 0
        assert 0 < first["prefix"] < 620 * 0.7  # its own part, and a few rows on which the cut is tried
        assert 0 < first["features"] < 620 * 0.7
        assert second["prefix"] <= 3
    assert sum(first["features"] for _, first, _ in ended) == 620  # the head is solved once, on all of them
