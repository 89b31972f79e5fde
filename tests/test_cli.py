"""The command line in processes of its own: exit codes, one line for people, one JSON document for programs.

Importing torch takes most of such a process. What needs it runs in children of one process that has imported it
already: each child runs the module `adapters` as `python -m adapters` does, with arguments and streams of its own.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
from warm_host import Warm, environment

import adapters

ROOT = Path(adapters.__file__).parents[1]
HEAVY = {"torch", "transformers", "datasets", "pandas", "peft", "numpy", "accelerate", "sklearn"}


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    def fault(self) -> str:
        """The one line of a command that was refused."""
        assert self.code in (2, 3), self
        assert "Traceback" not in self.err, self.err
        lines = self.err.splitlines()
        assert [line for line in lines if line.startswith("adapters: ")] == lines[-1:], self.err
        assert self.out == ""
        return lines[-1]

    def document(self) -> Any:
        """The one JSON document of a command with --json."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def alone(*arguments: Any, folder: Path | None = None, options: tuple[str, ...] = ()) -> Done:
    """`python -m adapters` in a fresh process."""
    done = subprocess.run(
        [sys.executable, *options, "-m", "adapters", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment(),
        timeout=300,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def quick(warm: Warm) -> Callable[..., Done]:
    """The same in a child of a process that has imported torch."""

    def run(*arguments: Any, folder: Path | None = None, interrupt: str = "", number: int = signal.SIGINT) -> Done:
        return Done(*warm.command(*arguments, folder=folder, said=interrupt, number=number))

    return run


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@dataclass(frozen=True)
class Place:
    """Inputs that every command of the file reads and none changes."""

    base: Path
    rows: Path
    saved: Path

    def filled(self, arguments: str | list[str], out: Path) -> list[str]:
        parts = arguments.split() if isinstance(arguments, str) else arguments
        names = {"base": self.base, "rows": self.rows, "saved": self.saved, "out": out, "here": out.parent}
        return [re.sub(r"<(\w+)>", lambda found: str(names[found[1]]), part) for part in parts]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    base = Path(tiny.folder("bert", folder / "base"))
    adapted = adapters.adapt(str(base), "lora", labels=list(tiny.LABELS))
    tiny.shake(adapted)
    saved = adapters.save(adapted, folder / "saved")
    return Place(base, write_rows(folder / "rows.csv", tiny.rows(60)), saved)


def imported(importtime: str) -> set[str]:
    """The top-level packages in the report of `python -X importtime`."""
    found = re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s*(\S+)$", importtime, re.MULTILINE)
    return {name.split(".")[0] for name in found}


# ---------------------------------------------------------------------- without torch


def test_inspect_prints_one_document_and_imports_no_torch(place: Place) -> None:
    done = alone("inspect", place.saved, "--json", options=("-X", "importtime"))
    found = done.document()
    # What answers at once reads a manifest and hashes files: no client of the hub, no YAML, no tables.
    assert not imported(done.err) & (HEAVY | {"huggingface_hub", "safetensors", "yaml", "rich", "requests", "httpx"})
    assert "adapters" in imported(done.err)
    assert found["folder"] == str(place.saved)
    assert found["strategy"] == "lora"
    assert found["task"]["options"]["labels"] == ["a", "b", "c"]
    assert found["backbone"]["name"] == str(place.base)
    assert found["bytes"] == (place.saved / "adapter_model.safetensors").stat().st_size
    assert found["parameters"] == sum(group["parameters"] for group in found["groups"].values())
    assert any(name.startswith("head: ") for name in found["groups"])


def test_inspect_prints_a_table_for_people(place: Place) -> None:
    done = alone("inspect", place.saved)
    assert done.code == 0
    assert done.err == ""
    for said in (str(place.saved), "lora adapter, every digest right", str(place.base), "3 labels: a, b, c", "lora_A"):
        assert said in done.out
    assert " 1 tensor " in done.out
    assert " 1 tensors" not in done.out
    assert all(line == line.rstrip() for line in done.out.splitlines())


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["inspect", "--help"]],
    ids=" ".join,
)
def test_help_imports_no_torch(arguments: list[str]) -> None:
    done = alone(*arguments, options=("-X", "importtime"))
    assert done.code == 0
    assert "Usage: adapters" in done.out
    assert not imported(done.err) & (HEAVY | {"huggingface_hub", "safetensors", "yaml", "rich"})


def test_help_names_every_task_and_strategy() -> None:
    from adapters import console
    from adapters.adapt import STRATEGIES
    from adapters.tasks import TASKS

    for known, said in ((TASKS, console.TASK_NAMES), (STRATEGIES, console.STRATEGY_NAMES)):
        assert set(re.sub(r" \(.*?\)", "", said).split(", ")) == set(known)


LIGHT: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "nothing at all": (["train"], ("'model' is missing", "'data' is missing", "'output' is missing")),
    "a model where the recipe stands": (
        ["train", "<base>", "--data", "d", "--output", "<out>"],
        ("not a recipe", "given as --model"),
    ),
    "unknown strategy": (
        ["train", "--model", "m", "--data", "d", "--output", "<out>", "--strategy", "loraa"],
        ("unknown strategy 'loraa'", "Did you mean 'lora'"),
    ),
    "unknown task": (
        ["train", "--model", "m", "--data", "d", "--output", "<out>", "--task", "chat"],
        ("unknown task 'chat'", "text-classification"),
    ),
    "alias of an option": (
        ["train", "--model", "m", "--data", "d", "--output", "<out>", "--set", "options.lora_r=4"],
        ("unknown option 'lora_r'", "The name here is 'r'"),
    ),
    "unknown key": (
        ["train", "--model", "m", "--data", "d", "--output", "<out>", "--set", "sed=4"],
        ("unknown key 'sed'", "Did you mean 'seed'"),
    ),
    "several values": (
        ["train", "--model", "m", "--data", "d", "--output", "<out>", "--set", "seed=x", "--set", "limit=0"],
        ("seed", "limit"),
    ),
    "no assignment": (["train", "--set", "seed"], ("'seed' is not key=value", "--set")),
    "broken assignment": (["train", "--set", "labels=[a"], ("labels", "broken YAML")),
    "no recipe": (["train", "<here>/nowhere.yaml"], ("no such recipe", "nowhere.yaml")),
    "no adapter": (["inspect", "<base>"], ("not an adapter folder", "adapter.json", "config.json")),
    "no folder": (["inspect", "<here>/nowhere"], ("no such adapter folder", "nowhere")),
}


@pytest.mark.parametrize("name", LIGHT)
def test_a_request_that_cannot_be_is_one_line_and_imports_no_torch(name: str, place: Place, tmp_path: Path) -> None:
    arguments, said = LIGHT[name]
    filled = place.filled(arguments, tmp_path / "out")
    done = alone(*filled, folder=tmp_path, options=("-X", "importtime"))
    assert not imported(done.err) & HEAVY
    own = "".join(line for line in done.err.splitlines(keepends=True) if not line.startswith("import time:"))
    fault = Done(done.code, done.out, own).fault()
    assert own.count("\n") == 1
    assert done.code == 2
    for words in said:
        assert words in fault
    assert list(tmp_path.iterdir()) == []


RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "a key twice": ("model: a\ndata: b\noutput: c\nmodel: d\n", ("'model' stands twice", "line 4")),
    "several faults": (
        "base_model: a\nstrategie: lora\noutput: c\nlimit: none\n",
        ("'base_model'", "'model'", "'strategie'", "'strategy'", "'data' is missing", "limit"),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_cannot_be_is_one_line(name: str, tmp_path: Path) -> None:
    content, said = RECIPES[name]
    (tmp_path / "run.yaml").write_text(content)
    done = alone("train", "run.yaml", folder=tmp_path)
    fault = done.fault()
    assert done.code == 2
    assert done.err.count("\n") == 1
    for words in said:
        assert words in fault
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["trian"], "train"), (["train", "--modle", "x"], "--model"), (["inspect"], "folder")],
    ids=["command", "option", "argument"],
)
def test_a_misspelt_command_line_is_one_line_too(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = alone(*arguments, folder=tmp_path)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert said in done.err
    assert len(done.err.splitlines()) == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = alone("inspect", "nowhere", "--debug", folder=tmp_path)
    assert done.code != 0
    assert "Traceback" in done.err
    assert "no such adapter folder" in done.err


def test_a_damaged_folder_is_refused_without_torch(place: Place, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(place.saved, tmp_path / "damaged"))
    content = bytearray((damaged / "adapter_model.safetensors").read_bytes())
    content[-3] ^= 1
    (damaged / "adapter_model.safetensors").write_bytes(content)
    done = alone("inspect", damaged, "--json", options=("-X", "importtime"))
    assert done.code == 2
    assert done.out == ""
    assert not imported(done.err) & HEAVY
    assert "tensor base_model.model." in done.err.splitlines()[-1]


# ---------------------------------------------------------------------- good input


def test_train_takes_every_main_option(place: Place, quick: Callable[..., Done], tmp_path: Path) -> None:
    rows = [{"review": row["text"], "stars": row["label"]} for row in tiny.rows(60)]
    write_rows(tmp_path / "reviews.csv", rows)
    settings = {
        "options.r": "4",
        "options.target_modules": "[query, value]",
        "options.max_length": "16",
        "train.learning_rate": "5e-3",
        "train.num_train_epochs": "2",
        "train.per_device_train_batch_size": "16",
        "labels": "[c, b, a]",
        "validation": "0.2",
        "seed": "3",
    }
    done = quick(
        *("train", "--model", place.base, "--data", "reviews.csv", "--task", "text-classification"),
        *("--strategy", "lora", "--output", "out", "--column", "text=review", "--column", "label=stars", "--json"),
        *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")),
        folder=tmp_path,
    )
    found = done.document()
    assert found["strategy"] == "lora"
    assert found["task"] == "text-classification"
    assert found["rows"] == {"train": 42, "validation": 12, "test": 6}
    assert set(found["test"]) >= {"accuracy", "macro_f1", "loss"}
    assert found["adapter_bytes"] == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert "42 train, 12 validation, 6 test" in done.err
    assert "epoch 2 of 2" in done.err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "reviews.csv"]
    adapted = adapters.load(tmp_path / "out")
    assert adapted.strategy.r == 4
    assert {name.split(".")[-1] for name in adapted.strategy.modules} == {"query", "value"}
    assert adapted.task.labels == ("c", "b", "a")
    assert adapted.task.max_length == 16
    assert adapted.record.seed == 3
    assert adapted.record.settings["learning_rate"] == 5e-3
    recipe = adapters.Recipe.read(tmp_path / "out" / "run.yaml")
    assert recipe.columns == {"text": "review", "label": "stars"}
    assert recipe.train["num_train_epochs"] == 2


QUICK = ["--set", "train.num_train_epochs=1", "--set", "train.per_device_train_batch_size=16"]


@pytest.mark.parametrize("strategy", ["freeze", "qlora"])
def test_every_strategy_trains_from_the_command_line(
    strategy: str, place: Place, quick: Callable[..., Done], tmp_path: Path
) -> None:
    arguments = ["train", "--model", place.base, "--data", place.rows, "--output", "out", "--strategy", strategy]
    done = quick(*arguments, *QUICK, folder=tmp_path)
    assert done.code == 0, done.err
    assert re.search(r"^saved +out \(", done.out, re.MULTILINE)
    assert re.search(r"^test +accuracy \d\.\d{4} \(majority 0\.3333, untrained \d\.\d{4}\)$", done.out, re.MULTILINE)
    assert "adapters predict out" in done.out
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    found = json.loads((tmp_path / "out" / "adapter.json").read_text())
    assert found["backbone"]["quantization"] == ("nf4" if strategy == "qlora" else None)


def test_a_recipe_runs_and_options_go_over_it(place: Place, quick: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"model: {place.base}\ndata: {place.rows}\noutput: first\nstrategy: probe\n"
        "train:\n  num_train_epochs: 1\n  learning_rate: 1e-2\n"
    )
    assert quick("train", "run.yaml", "--json", folder=tmp_path).document()["output"] == "first"
    again = quick("train", "run.yaml", "--output", "second", "--set", "test=0", "--json", folder=tmp_path).document()
    assert again["output"] == "second"
    assert "test" not in again
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["first", "run.yaml", "second"]


def test_evaluate_measures_labelled_rows(place: Place, quick: Callable[..., Done]) -> None:
    found = quick("evaluate", place.saved, "--data", place.rows, "--json").document()
    assert found["rows"] == 60
    wanted = adapters.evaluate(adapters.load(place.saved), str(place.rows))
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    done = quick("evaluate", place.saved, "--data", place.rows)
    assert re.search(rf"^accuracy +{wanted['accuracy']:.4f}$", done.out, re.MULTILINE)


def test_evaluate_takes_the_test_part_and_says_so(place: Place, quick: Callable[..., Done], tmp_path: Path) -> None:
    write_rows(tmp_path / "train.csv", tiny.rows(12))
    write_rows(tmp_path / "test.csv", [{"review": r["text"], "stars": r["label"]} for r in tiny.rows(9, seed=1)])
    options = ["--column", "text=review", "--column", "label=stars", "--json"]
    found = quick("evaluate", place.saved, "--data", tmp_path, *options).document()
    assert (found["rows"], found["split"]) == (9, "test")


def test_predict_answers_texts_and_files(place: Place, quick: Callable[..., Done], tmp_path: Path) -> None:
    texts = [row["text"] for row in tiny.rows(5)]
    wanted = adapters.predict(adapters.load(place.saved), texts)
    write_rows(tmp_path / "rows.csv", [{"review": text} for text in texts])
    one = quick("predict", place.saved, *texts, "--json").document()
    two = quick("predict", place.saved, "--data", tmp_path / "rows.csv", "--column", "text=review", "--json").document()
    assert one == two
    assert [entry["label"] for entry in one["predictions"]] == [entry["label"] for entry in wanted]
    assert [e["score"] for e in one["predictions"]] == pytest.approx([e["score"] for e in wanted], rel=1e-5)
    done = quick("predict", place.saved, *texts)
    assert done.code == 0
    cells = [line.split("\t") for line in done.out.splitlines()]
    assert [cell[0] for cell in cells] == [entry["label"] for entry in wanted]
    assert [cell[2] for cell in cells] == texts


def test_predict_takes_another_place_of_the_same_backbone(
    place: Place, quick: Callable[..., Done], tmp_path: Path
) -> None:
    moved = shutil.copytree(place.base, tmp_path / "moved")
    one = quick("predict", place.saved, "the parcel", "--model", moved, "--json").document()
    assert one == quick("predict", place.saved, "the parcel", "--json").document()


def test_answers_and_numbers_of_other_tasks_are_readable(
    place: Place, quick: Callable[..., Done], tmp_path: Path
) -> None:
    base = tiny.folder("bert", tmp_path / "base", auto="AutoModelForMaskedLM")
    adapters.save(adapters.adapt(base, "lora", task="masked-lm"), tmp_path / "fill")
    for text in ("my [MASK]\nis [MASK]", "my [MASK] is late"):  # a list of fillings for each mask, or for the one
        done = quick("predict", tmp_path / "fill", text)
        assert done.code == 0, done.err
        (line,) = done.out.splitlines()
        answer, row = line.split("\t")
        assert (row, len(json.loads(answer))) == (" ".join(text.split()), 2 if "\n" in text else 5)
    lines = quick("evaluate", tmp_path / "fill", "--data", place.rows).out.splitlines()
    assert {len(line) for line in lines} == {len(lines[0])}
    assert all(len(line.split()) == 2 for line in lines)
    merged = quick("merge", tmp_path / "fill", tmp_path / "merged").out
    assert f"next      transformers.pipeline('fill-mask', '{(tmp_path / 'merged').as_posix()}')" in merged
    tags = {"id2label": {0: "O", 1: "B-X", 2: "I-X"}}
    live = tiny.model("bert", auto="AutoModelForTokenClassification", **tags)
    live.save_pretrained(tmp_path / "tagger")
    adapted = adapters.adapt(live, "lora", processor=tiny.tokenizer())
    adapted.record.backbone = str(tmp_path / "tagger")
    adapters.save(adapted, tmp_path / "tags")
    words = tmp_path / "words.jsonl"
    words.write_text('{"tokens": ["my", "parcel"]}\n')
    done = quick("predict", tmp_path / "tags", "--data", words)
    assert done.out.rstrip().endswith("\tmy parcel"), done.err


def test_rows_for_another_task_name_the_others(place: Place, quick: Callable[..., Done], tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("my parcel\n\nis late\n")
    for data, task in ((texts, "masked-lm"), (_pictures(tmp_path / "pictures"), "image-classification")):
        line = quick("train", "--model", place.base, "--data", data, "--output", tmp_path / "out").fault()
        assert "No task was named, so it is text-classification; the others are " in line
        assert task in line
        named = quick(
            "train",
            "--model",
            place.base,
            "--data",
            data,
            "--output",
            tmp_path / "out",
            "--task",
            "text-classification",
        ).fault()
        assert "No task was named" not in named


def _pictures(folder: Path) -> Path:
    from PIL import Image

    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / name / "1.png")
    return folder


def test_a_remark_is_said_once(place: Place, quick: Callable[..., Done], tmp_path: Path) -> None:
    done = quick(
        *("train", "--model", place.base, "--data", place.rows, "--output", tmp_path / "out"),
        *("--set", "options.max_length=4", "--set", "train.num_train_epochs=1"),
    )
    assert done.code == 0, done.err
    cut = [line for line in done.err.splitlines() if "longer than 4 tokens" in line]
    assert cut
    assert len(cut) == len(set(cut))
    assert "gemm_4bit" not in done.err
    assert "attention_mask" not in done.err


def test_merge_writes_a_plain_model_and_reports(place: Place, quick: Callable[..., Done], tmp_path: Path) -> None:
    from transformers import pipeline

    found = quick("merge", place.saved, tmp_path / "merged", "--json").document()
    assert found["output"] == str(tmp_path / "merged")
    assert found["logits_checked"] is True
    assert found["agreement"] == 1.0
    assert found["verified"] == found["edited"] > 0
    answer = pipeline("text-classification", model=str(tmp_path / "merged"), device="cpu")("the parcel is late")[0]
    wanted = adapters.predict(adapters.load(place.saved), ["the parcel is late"])[0]
    assert answer["label"] == wanted["label"]
    assert answer["score"] == pytest.approx(wanted["score"], abs=1e-5)
    assert [entry.name for entry in tmp_path.iterdir()] == ["merged"]


# ---------------------------------------------------------------------- bad input

START = "train --model <base> --output <out> "
BAD: dict[str, tuple[int, str | list[str], tuple[str, ...]]] = {
    # requests
    "training alias": (
        2,
        START + "--data <rows> --set train.batch_size=4",
        ("'batch_size'", "per_device_train_batch_size"),
    ),
    "training value": (2, START + "--data <rows> --set train.learning_rate=fast", ("learning_rate",)),
    "option value": (2, START + "--data <rows> --set options.max_length=long", ("max_length", "long")),
    "word for a switch": (2, START + "--data <rows> --set options.use_dora=no", ("use_dora", "no")),
    "target": (2, START + "--data <rows> --set options.target_modules=[qurey]", ("'qurey'", "Did you mean 'query'")),
    "rank pattern": (
        2,
        [*START.split(), "--data", "<rows>", "--set", "options.rank_pattern={zz: 4}"],
        ("'zz'", "rank_pattern"),
    ),
    "block": (2, START + "--data <rows> --set options.layers_to_transform=[9]", ("no block 9", "0 to 2")),
    "freeze pattern": (
        2,
        START + "--data <rows> --strategy freeze --set options.pattern=zzz",
        ("'zzz'", "finds nothing"),
    ),
    "quantization": (2, START + "--data <rows> --set quantization=nf5", ("'nf5'", "Did you mean 'nf4'")),
    "shares": (2, START + "--data <rows> --set validation=0.6 --set test=0.6", ("shares", "0.6")),
    "model folder": (
        2,
        "train --model <here>/nowhere --data <rows> --output <out>",
        ("no such model folder", "nowhere"),
    ),
    "model file": (2, "train --model <rows> --data <rows> --output <out>", ("no such model folder", "rows.csv")),
    "no model": (2, "train --model <here> --data <rows> --output <out>", ("not a model folder", "config.json")),
    "data file": (2, START + "--data <here>/nowhere.csv", ("no such file", "nowhere.csv")),
    "data folder": (2, START + "--data <base>", ("no training file", "config.json")),
    "split": (2, [*START.split(), "--set", "data={tset: <rows>}"], ("unknown split 'tset'", "Did you mean 'test'")),
    "no training rows": (2, [*START.split(), "--set", "data={test: <rows>}"], ("train",)),
    "task column": (2, START + "--data <rows> --column txt=text", ("no column 'txt'", "Did you mean 'text'")),
    "no pair": (2, START + "--data <rows> --column text", ("'text' is not key=value", "--column")),
    "texts and data": (2, "predict <saved> text --data <rows>", ("texts or --data",)),
    "neither": (2, "predict <saved>", ("texts or --data",)),
    "no adapter": (2, "evaluate <base> --data <rows>", ("not an adapter folder", "adapter.json")),
    "no folder": (2, "predict <here>/nowhere text", ("no such adapter folder", "nowhere")),
    "merge to what": (2, "merge <saved> <out> --dtype float99", ("float99", "float32")),
    "merge into which form": (2, "merge <saved> <out> --quantization nf5", ("unknown quantization 'nf5'", "nf4")),
    "merge onto what": (2, "merge <saved> <out> --onto base", ("unknown base 'base'", "training")),
    "merge of what": (2, "merge <base> <out>", ("not an adapter folder",)),
    "merge into what": (2, "merge <saved> <out> --base <here>/nowhere", ("no such backbone folder", "nowhere")),
    # data
    "data column": (3, START + "--data <rows> --column text=txet", ("no column 'txet'", "Did you mean 'text'")),
    "unknown label": (3, START + "--data <rows> --set labels=[a,b]", ("unknown label 'c'", "a, b")),
    "empty text": (3, ["predict", "<saved>", "a text", " "], ("empty text", "row 1")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_with_the_right_code_and_leaves_nothing(
    name: str, place: Place, quick: Callable[..., Done], tmp_path: Path
) -> None:
    code, arguments, said = BAD[name]
    done = quick(*place.filled(arguments, tmp_path / "out"), folder=tmp_path)
    fault = done.fault()
    assert done.code == code
    for words in said:
        assert words in fault
    assert list(tmp_path.iterdir()) == []


FILES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "empty": ("bad.csv", b"", ("empty", "bad.csv")),
    "header": ("bad.csv", b"text,label\n", ("empty", "0 rows")),
    "semicolons": ("bad.csv", b"text;label\nhello;a\n", ("'text;label'", ".tsv")),
    "ragged": ("bad.csv", b"text,label\none,a\ntwo,b,c\n", ("line 3", "2 fields", "saw 3")),
    "latin-1": ("bad.csv", "text,label\ncafé,a\n".encode("latin-1"), ("utf-8", "0xe9")),
    "broken line": ("bad.jsonl", b'{"text": "a", "label": "x"}\n{"text"\n', ("broken JSON", "line 2")),
    "misspelt key": (
        "bad.jsonl",
        b'{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n{"text": "c", "lable": "x"}\n',
        ("row 2", "lable"),
    ),
    "mixed": ("bad.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"text": 3}\n', ("mixed kinds", "row 2", "'text'")),
    "column": ("bad.csv", b"review,label\nhello,a\nyou,b\n", ("no column 'text'", "review, label")),
    "no text": ("bad.csv", b"text,label\nhello,a\n,b\n", ("empty text", "row 1")),
    "no label": ("bad.csv", b"text,label\nhello,a\nyou,\n", ("label is missing", "row 1")),
    "unknown": ("bad.csv", b"text,label\nhello,a\nyou,zz\n", ("unknown label 'zz'", "row 1", "a, b, c")),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_rows_are_one_line_with_code_3(name: str, place: Place, quick: Callable[..., Done], tmp_path: Path) -> None:
    file, content, said = FILES[name]
    (tmp_path / file).write_bytes(content)
    done = quick("evaluate", place.saved, "--data", file, "--json", folder=tmp_path)
    fault = done.fault()
    assert done.code == 3
    for words in said:
        assert words in fault


@pytest.mark.parametrize("name", ["empty", "ragged", "latin-1", "broken line", "misspelt key"])
def test_a_training_run_on_bad_rows_leaves_nothing(
    name: str, place: Place, quick: Callable[..., Done], tmp_path: Path
) -> None:
    file, content, said = FILES[name]
    (tmp_path / file).write_bytes(content)
    done = quick("train", "--model", place.base, "--data", file, "--output", "out", folder=tmp_path)
    fault = done.fault()
    assert done.code == 3
    for words in said:
        assert words in fault
    assert [entry.name for entry in tmp_path.iterdir()] == [file]


def test_another_backbone_is_refused_with_its_tensors(place: Place, quick: Callable[..., Done], tmp_path: Path) -> None:
    other = tiny.folder("bert", tmp_path / "other", seed=7)
    for arguments in (
        ["predict", place.saved, "a text", "--model", other],
        ["evaluate", place.saved, "--data", place.rows, "--model", other],
        ["merge", place.saved, "out", "--base", other],
    ):
        done = quick(*arguments, folder=tmp_path)
        assert "embeddings.weight" in done.fault()
        assert "not the backbone" in done.fault()
        assert done.code == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["other"]


def test_a_packed_merge_says_what_it_did(place: Place, quick: Callable[..., Done], tmp_path: Path) -> None:
    said = quick("merge", place.saved, tmp_path / "merged", "--quantization", "int8").out
    for line in (
        "onto      the weights that the adapter was trained on, the checkpoint's own",
        " weights as int8; ",
        "bound     0.2 of the logits' spread; they are ",
        "answers   agree on ",
    ):
        assert line in said
    assert "accepted" not in said
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]["load_in_8bit"]


def test_an_output_that_holds_something_else_is_refused(
    place: Place, quick: Callable[..., Done], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for arguments in (
        ["train", "--model", place.base, "--data", place.rows, "--output", "out"],
        ["merge", place.saved, "out"],
    ):
        done = quick(*arguments, folder=tmp_path)
        assert "already holds something else" in done.fault()
        assert "thesis.txt" in done.fault()
        assert done.code == 2
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_numbers_that_go_bad_have_a_code_of_their_own(place: Place, quick: Callable[..., Done], tmp_path: Path) -> None:
    arguments = ["--data", place.rows, "--output", "out", "--strategy", "full", "--set", "train.learning_rate=1e38"]
    done = quick("train", "--model", place.base, *arguments, folder=tmp_path)
    assert done.code == 4, done.err
    assert "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("adapters: ")
    assert "step" in done.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_run_saves_its_step_and_goes_on(
    name: str, code: int, place: Place, quick: Callable[..., Done], tmp_path: Path
) -> None:
    arguments = ["train", "--model", place.base, "--data", place.rows, "--output", "out", "--strategy", "probe"]
    settings = ["--set", "train.num_train_epochs=200", "--set", "train.early_stopping_patience=null"]
    done = quick(*arguments, *settings, folder=tmp_path, interrupt="epoch 2 ", number=signal.Signals[name])
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    command = shlex.join(["adapters", *map(str, [*arguments, *settings]), "--resume"])
    said = [line for line in done.err.splitlines() if line.startswith(f"stopped by {name} after step ")]
    assert said[0].endswith(f", which is saved; go on with {command}"), done.err
    step = int(said[0].split("after step ")[1].split(",")[0])
    assert (tmp_path / ".out.run" / f"checkpoint-{step}").is_dir()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".out.run"]
    again = quick(*arguments, *settings, folder=tmp_path)
    assert again.code == 2
    assert "--resume" in again.fault()
    fewer = ["--set", "train.num_train_epochs=4", "--set", "train.early_stopping_patience=null"]
    again = quick(*arguments, *fewer, "--resume", folder=tmp_path)
    assert again.code == 2
    assert "num_train_epochs was 200, is 4. Go on with the old values" in again.fault()
    if name == "SIGINT":
        done = quick(*arguments, *fewer, "--no-resume", "--json", folder=tmp_path)
    else:
        done = quick(*arguments, *fewer, "--resume", "--override", "num_train_epochs", "--json", folder=tmp_path)
    assert done.document()["output"] == "out"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_the_page_of_the_command_line_has_every_command_and_option() -> None:
    from typer.main import get_command

    from adapters.cli import app

    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    sections = {part.split("\n", 1)[0].strip(): part for part in page.split("\n## ")[1:]}
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        assert name in sections, name
        if re.search(r"See \[\w+\]\(\w+\.md\)\.\s*$", sections[name]) and "```" not in sections[name]:
            continue  # a page of its own
        for option in command.params:
            spelt = [word for word in (*option.opts, *option.secondary_opts) if word.startswith("--")]
            assert not spelt or any(f"{word}" in sections[name] for word in spelt), (name, spelt)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Name the right one: columns={'text': ...}.", "Name the right one: --column text=YOUR_COLUMN."),
        ("e.g. columns={'source': 'de', 'target': 'en'}.", "e.g. --column source=de --column target=en."),
        ("name the columns to read: columns={...}.", "name the columns to read: --column TASK_COLUMN=YOUR_COLUMN."),
        ("nothing of the kind {'a': 1}", "nothing of the kind {'a': 1}"),
    ],
)
def test_columns_are_spoken_of_as_the_command_line_takes_them(text: str, said: str) -> None:
    from adapters.console import spoken

    assert spoken(text) == said


def test_a_column_that_is_missing_names_the_option(place: Place, quick: Callable[..., Done], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "odd.csv", [{"words": "a", "label": tiny.LABELS[0]}] * 4)
    done = quick("evaluate", place.saved, "--data", rows)
    assert done.code == 3
    assert "--column text=YOUR_COLUMN" in done.fault()
