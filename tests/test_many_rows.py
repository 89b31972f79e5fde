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
