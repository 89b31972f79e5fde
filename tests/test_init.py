"""A recipe drafted from rows: the task and columns found, every choice with its reason, and a run that it starts."""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from typer.testing import CliRunner
from warm_host import Warm, environment

from adapters import adapt, drafting, manifest
from adapters.cli import app
from adapters.drafting import draft, write
from adapters.errors import DataError, FolderError, RequestError
from adapters.recipe import Recipe
from adapters.tasks import TASKS
from adapters.validation import validate

HEAVY = {"torch", "transformers", "peft", "sklearn", "scipy", "bitsandbytes", "accelerate"}


WORDS = ["good", "bad", "long", "short", "warm"]


def sentence(number: int, length: int = 12) -> str:
    return " ".join(f"{WORDS[(number + n) % 5]}{number}" for n in range(length))


def csv_of(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def jsonl_of(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def reviews(path: Path, count: int = 60) -> str:
    rows = [
        {"id": str(n), "stars_given": sentence(n, 2), "review": sentence(n), "mood": ("happy", "unhappy")[n % 2]}
        for n in range(count)
    ]
    return csv_of(path, rows)


MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ANSWERS = {"text": ["good0"], "answer_start": [0]}
SETS: dict[str, tuple[list[dict[str, Any]], str, dict[str, str]]] = {
    "labels": ([{"text": sentence(n), "label": "ab"[n % 2]} for n in range(30)], "text-classification", {}),
    "names": (
        [{"review": sentence(n), "mood": "ab"[n % 2], "id": n} for n in range(30)],
        "text-classification",
        {"text": "review", "label": "mood"},
    ),
    "contents": (
        [{"a": sentence(n), "b": ["x", "y", "z"][n % 3], "c": f"u{n}"} for n in range(30)],
        "text-classification",
        {"text": "a", "label": "b"},
    ),
    "pair": (
        [{"premise": sentence(n), "hypothesis": sentence(n, 4), "label": "ab"[n % 2]} for n in range(30)],
        "text-classification",
        {"text": "premise", "text_pair": "hypothesis"},
    ),
    "tags": ([{"tokens": [f"a{n}", "b"], "tags": ["O", "B-X"]} for n in range(30)], "token-classification", {}),
    "ner_tags": ([{"tokens": [f"a{n}", "b"], "ner_tags": ["O", "B-X"]} for n in range(30)], "token-classification", {}),
    "squad": (
        [{"question": f"q {n}?", "context": f"good0 {sentence(n)}", "answers": ANSWERS} for n in range(30)],
        "question-answering",
        {},
    ),
    "chat": ([{"messages": MESSAGES}] * 30, "causal-lm", {}),
    "alpaca": ([{"instruction": f"say {n}", "output": sentence(n)} for n in range(30)], "causal-lm", {}),
    "asked": (
        [{"question": f"q {n}?", "answer": sentence(n)} for n in range(30)],
        "causal-lm",
        {"prompt": "question", "completion": "answer"},
    ),
    "summaries": (
        [{"article": sentence(n, 30), "highlights": sentence(n, 3)} for n in range(30)],
        "seq2seq",
        {"source": "article", "target": "highlights"},
    ),
    "languages": (
        [{"en": sentence(n), "de": sentence(n, 3)} for n in range(30)],
        "seq2seq",
        {"source": "en", "target": "de"},
    ),
    "plain": ([{"text": sentence(n)} for n in range(30)], "causal-lm", {}),
}


@pytest.mark.parametrize("name", SETS)
def test_the_task_and_the_columns_are_found(name: str, tmp_path: Path) -> None:
    rows, task, columns = SETS[name]
    made = draft([jsonl_of(tmp_path / "rows.jsonl", rows)], file=str(tmp_path / "recipe.yaml"))
    assert made.recipe["task"] == task
    assert made.recipe.get("columns", {}) == columns
    write(made, tmp_path / "recipe.yaml")
    report = validate(tmp_path / "recipe.yaml")
    assert report.faults == (), report.lines()
    assert sum(report.rows.values()) == len(rows)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_named(task: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = {
        "text-classification": SETS["names"][0],
        "token-classification": [{"words": [f"a{n}", "b"], "ner": ["O", "B-X"]} for n in range(30)],
        "question-answering": SETS["squad"][0],
        "causal-lm": [{"body": sentence(n)} for n in range(30)],
        "masked-lm": [{"body": sentence(n)} for n in range(30)],
        "denoising": [{"body": sentence(n)} for n in range(30)],
        "next-sentence": [{"body": f"{sentence(n)}. {sentence(n + 1)}. {sentence(n + 2)}."} for n in range(30)],
        "seq2seq": [{"german": sentence(n), "english": sentence(n)} for n in range(30)],
        "image-classification": [],
    }[task]
    source = str(pictures(tmp_path)) if task == "image-classification" else jsonl_of(tmp_path / "rows.jsonl", rows)
    made = draft([source], task=task)
    assert made.recipe["task"] == task
    (tmp_path / "recipe.yaml").write_text(made.text)
    assert validate(tmp_path / "recipe.yaml").faults == ()


def pictures(folder: Path) -> Path:
    from PIL import Image

    for label in ("cat", "dog"):
        (folder / "pictures" / label).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "pictures" / label / f"{number}.png")
    return folder / "pictures"


def test_folders_of_pictures_text_and_conll_files(tmp_path: Path) -> None:
    made = draft([str(pictures(tmp_path))])
    assert made.recipe["task"] == "image-classification"
    assert made.recipe["labels"] == ["cat", "dog"]
    (tmp_path / "a.txt").write_text("\n\n".join(sentence(n) for n in range(30)))
    assert draft([str(tmp_path / "a.txt")]).recipe["task"] == "causal-lm"
    (tmp_path / "a.conll").write_text("\n".join(f"a{n} O\nb B-X\n" for n in range(30)))
    made = draft([str(tmp_path / "a.conll")])
    assert made.recipe["task"] == "token-classification"
    assert made.recipe["labels"] == ["O", "B-X"]


def test_plain_texts_take_the_task_that_the_model_is_for(tmp_path: Path) -> None:
    source = jsonl_of(tmp_path / "rows.jsonl", SETS["plain"][0])
    for kind, task in (("bert", "masked-lm"), ("gpt2", "causal-lm"), ("t5", "denoising")):
        assert draft([source], model=tiny.folder(kind, tmp_path / kind)).recipe["task"] == task


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        ([f"{n / 7:.2f}" for n in range(40)], "regression"),
        (["a|b", "a", "b|c", "c"] * 10, "multi-label"),
        ([str(n % 5) for n in range(40)], None),
    ],
)
def test_numbers_and_several_labels_are_seen(cells: list[str], problem: str | None, tmp_path: Path) -> None:
    rows = [{"text": sentence(n), "label": cell} for n, cell in enumerate(cells)]
    made = draft([csv_of(tmp_path / "rows.csv", rows)], task="text-classification")
    assert made.recipe.get("options", {}).get("problem") == problem
    (tmp_path / "recipe.yaml").write_text(made.text)
    assert validate(tmp_path / "recipe.yaml").faults == ()


def test_labels_that_yaml_would_read_otherwise_stay_texts(tmp_path: Path) -> None:
    names = ["1e-4", "true", "no", "null", "0", "a, b", "x: y", "# z", "[q]", "it's", 'say "hi"', " padded"]
    rows = [{"text": sentence(n), "label": names[n % len(names)]} for n in range(60)]
    made = draft([csv_of(tmp_path / "my rows.csv", rows)], task="text-classification", columns={"label": "label"})
    (tmp_path / "recipe.yaml").write_text(made.text)
    assert Recipe.read(tmp_path / "recipe.yaml").labels == sorted(names)


def test_several_files_are_parts(tmp_path: Path) -> None:
    for name in ("reviews_train", "reviews_dev", "x"):
        reviews(tmp_path / f"{name}.csv", 20)
    sources = [str(tmp_path / "reviews_train.csv"), str(tmp_path / "reviews_dev.csv"), f"test={tmp_path / 'x.csv'}"]
    made = draft(sources)
    assert list(made.recipe["data"]) == ["train", "validation", "test"]
    assert "validation" not in made.recipe
    with pytest.raises(RequestError, match="two files for 'train'"):
        draft([sources[0], f"train={tmp_path / 'x.csv'}"])


def test_every_key_has_its_reason_and_the_recipe_is_short(tmp_path: Path) -> None:
    made = draft([reviews(tmp_path / "reviews.csv")])
    lines = made.text.splitlines()
    assert 15 <= len(lines) <= 25
    assert all(len(line) <= 120 for line in lines if "reviews.csv" not in line)
    for number, line in enumerate(lines):
        if line and not line.startswith("#") and line != "columns:":
            assert "#" in line or lines[number - 1].startswith("#"), line
    assert any("happy 30, unhappy 30" in line for line in lines)
    assert any("median" in choice for choice in made.choices)


def test_what_cannot_be_told_is_asked_for(tmp_path: Path) -> None:
    source = csv_of(tmp_path / "rows.csv", [{"a": str(n), "b": str(n * 7.5)} for n in range(40)])
    with pytest.raises(DataError, match=r"do not tell which is which.*--column text=") as caught:
        draft([source])
    assert "found a, b" in str(caught.value)
    with pytest.raises(DataError, match="--column label="):
        draft([jsonl_of(tmp_path / "rows.jsonl", SETS["plain"][0])], task="text-classification")
    with pytest.raises(RequestError, match="Did you mean 'seq2seq'"):
        draft([source], task="seq2sek")
    with pytest.raises(RequestError, match="there is no such file"):
        draft([str(tmp_path / "none.csv")])


def test_a_model_that_cannot_do_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has a head for text-classification"):
        draft([reviews(tmp_path / "reviews.csv")], model=tiny.folder("vit", tmp_path / "vit"))


def test_nothing_is_overwritten_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reviews(tmp_path / "reviews.csv")
    (tmp_path / "recipe.yaml").write_text("mine")
    made = draft(["reviews.csv"])
    with pytest.raises(FolderError, match=r"there already.*--force"):
        write(made, "recipe.yaml")
    runner = CliRunner()
    refused = runner.invoke(app, ["init", "--data", "reviews.csv"])
    assert refused.exit_code != 0
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    done = runner.invoke(app, ["init", "--data", "reviews.csv", "--force"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "recipe.yaml").read_text() == made.text
    with pytest.raises(FolderError, match="cannot be written"):
        write(made, tmp_path / "nowhere" / "recipe.yaml")


def test_strategies_and_models_of_a_draft_are_there() -> None:
    assert drafting.STRATEGY in adapt.__globals__["STRATEGIES"]
    assert drafting.MODELS.keys() == TASKS.keys()


def test_from_a_csv_to_a_merged_model_by_the_lines_that_each_command_says(warm: Warm, tmp_path: Path) -> None:
    """A new user's first hour: every next command is the one that the last one printed."""
    reviews(tmp_path / "reviews.csv")
    base = tiny.folder("bert", tmp_path / "base")
    quick = ["--set", "train.max_steps=2", "--set", "train.report_to=none"]
    command = ["init", "--data", "reviews.csv", "--model", base]
    kinds = []
    while command:
        kinds.append(command[0])
        code, out, err = warm.command(*command, *(quick if command[0] == "train" else []), folder=tmp_path)
        assert code == 0, err[-2000:]
        following = [line for line in (out + err).splitlines() if line.startswith("next ")]
        assert len(following) == 1, out
        words = shlex.split(following[0])[1:]
        command = words[1:] if words[0] == "adapters" else []
    assert kinds == ["init", "validate", "train", "predict", "merge"]
    assert (tmp_path / "out" / "reviews-merged" / "config.json").is_file()
    assert manifest.read_manifest(tmp_path / "out" / "reviews")["task"]["name"] == "text-classification"


def test_it_imports_no_torch(tmp_path: Path) -> None:
    reviews(tmp_path / "reviews.csv")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "adapters", "init", "--data", "reviews.csv", "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["recipe"]["columns"] == {"text": "review", "label": "mood"}
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not loaded & HEAVY
