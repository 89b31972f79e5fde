"""A run as data: the strict YAML, every fault at once, and the run itself from rows to a tested adapter."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

import adapters
from adapters import yamltext
from adapters.errors import AdaptersError, DataError, RequestError
from adapters.recipe import changed

ROOT = Path(adapters.__file__).parents[1]
QUICK: dict[str, Any] = {"num_train_epochs": 1, "per_device_train_batch_size": 16, "learning_rate": 5e-3}
NEEDED = {"model": "some/model", "data": "rows.csv", "output": "out"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.folder("bert", tmp_path_factory.mktemp("base") / "bert")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.csv", tiny.rows(60))


def made(base: str, rows: Any, folder: Path, **changes: Any) -> adapters.Recipe:
    return adapters.Recipe(**{"model": base, "data": rows, "output": str(folder / "out"), "train": QUICK} | changes)


def weights(folder: Path | str) -> str:
    return json.loads((Path(folder) / "adapter.json").read_text())["files"]["adapter_model.safetensors"]["sha256"]


# ---------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("0.1", 0.1),
        ("-.inf", float("-inf")),
        ("7", 7),
        ("-7", -7),
        ("010", 10),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("NO", "NO"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("2020-01-01", "2020-01-01"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("null", None),
        ("~", None),
        ("", None),
        ("NA", "NA"),
        ("None", "None"),
        ("[query, value]", ["query", "value"]),
        ("{query: 4, value: 1e-3}", {"query": 4, "value": 1e-3}),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
    ],
)
def test_yaml_means_what_it_says(text: str, value: Any) -> None:
    found = yamltext.parse_yaml(f"key: {text}", "here")["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: a\nmodel: b\n", 2),
        ("train:\n  seed: 1\n  learning_rate: 1\n  seed: 2\n", 4),
        ("options: {r: 1, r: 2}\n", 1),
        ("list:\n- a: 1\n  a: 2\n", 3),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_line(text: str, line: int) -> None:
    with pytest.raises(RequestError, match=rf"stands twice \(here, line {line}\)"):
        yamltext.parse_yaml(text, "here")


@pytest.mark.parametrize(
    "text",
    [
        "model: [a\n",
        "model: a: b\n",
        "\tmodel: a\n",
        "model: !!python/object:os.system x\n",
        "model: &x a\n<<: *y\n",
        "model: {{ name }}\n",
        "? [1, 2]\n: 3\n",
    ],
    ids=["bracket", "colon", "tab", "tag", "alias", "template", "list as key"],
)
def test_broken_yaml_is_one_line_that_says_where(text: str) -> None:
    with pytest.raises(RequestError, match="here") as caught:
        yamltext.parse_yaml(text, "here")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- reading


def test_what_is_left_out_has_its_default() -> None:
    made = adapters.Recipe(**NEEDED)
    assert made.task == "text-classification"
    assert made.strategy == "lora"
    assert (made.validation, made.test, made.seed) == (0.1, 0.1, 0)
    assert made.labels is None
    assert made.options == made.train == made.columns == made.load == {}


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("base_model", "model"),
        ("model_name_or_path", "model"),
        ("adapter", "strategy"),
        ("finetuning_type", "strategy"),
        ("dataset", "data"),
        ("output_dir", "output"),
        ("training", "train"),
        ("args", "train"),
        ("strategie", "strategy"),
        ("outptu", "output"),
    ],
)
def test_an_unknown_key_is_refused_with_the_right_name(wrong: str, right: str) -> None:
    with pytest.raises(RequestError, match=rf"unknown key '{wrong}'.*'{right}'"):
        adapters.Recipe.make({**NEEDED, wrong: "x"}, "here")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lora_r", "r"),
        ("lora_rank", "r"),
        ("alpha", "lora_alpha"),
        ("lora_target", "target_modules"),
        ("cutoff_len", "max_length"),
        ("label_smoothing_factor", "label_smoothing"),
        ("target_module", "target_modules"),
    ],
)
def test_an_unknown_option_is_refused_with_the_right_name(wrong: str, right: str) -> None:
    with pytest.raises(RequestError, match=rf"unknown option '{wrong}'.*'{right}'"):
        adapters.Recipe.make({**NEEDED, "options": {wrong: 4}}, "here")


def test_an_option_must_belong_to_the_strategy_or_the_task() -> None:
    made = adapters.Recipe.make({**NEEDED, "strategy": "freeze", "options": {"layers": 1, "max_length": 64}}, "here")
    assert made.options == {"layers": 1, "max_length": 64}
    with pytest.raises(RequestError, match=r"unknown option 'r'.*'freeze'.*'text-classification'"):
        adapters.Recipe.make({**NEEDED, "strategy": "freeze", "options": {"r": 4}}, "here")


def test_unknown_strategies_and_tasks_are_refused_with_the_known_ones() -> None:
    with pytest.raises(RequestError, match=r"unknown strategy 'loraa'.*Did you mean 'lora'"):
        adapters.Recipe.make({**NEEDED, "strategy": "loraa"}, "here")
    with pytest.raises(RequestError, match=r"unknown task 'text-classifcation'.*Did you mean 'text-classification'"):
        adapters.Recipe.make({**NEEDED, "task": "text-classifcation"}, "here")


def test_every_fault_of_the_keys_is_said_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        adapters.Recipe.make({"model": 5, "sed": 1, "dataset": "x", "limit": 0, "seed": "x", "labels": "a"}, "my.yaml")
    text = str(caught.value)
    assert text.startswith("my.yaml: ")
    for said in ("model", "'sed'", "'dataset'", "'data' is missing", "'output' is missing", "limit", "seed", "labels"):
        assert said in text
    assert "\n" not in text


def test_every_unknown_option_is_said_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        adapters.Recipe.make({**NEEDED, "options": {"lora_r": 4, "max_seq_length": 64}}, "here")
    for said in ("'lora_r'", "'r'", "'max_seq_length'", "'max_length'"):
        assert said in str(caught.value)


def test_an_unknown_strategy_does_not_hide_an_unknown_task() -> None:
    with pytest.raises(RequestError) as caught:
        adapters.Recipe.make({**NEEDED, "strategy": "loraa", "task": "chat"}, "here")
    for said in ("'loraa'", "'chat'"):
        assert said in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"validation": 0},
        {"validation": 1},
        {"test": -0.1},
        {"test": 1},
        {"limit": 0},
        {"limit": 1.5},
        {"seed": "x"},
        {"labels": "a"},
        {"columns": ["text"]},
        {"options": [1]},
        {"train": "fast"},
        {"data": 5},
        {"model": None},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"here: .*{next(iter(change))}"):
        adapters.Recipe.make({**NEEDED, **change}, "here")


def test_changes_go_over_what_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: a\ndata: b\noutput: c\noptions:\n  r: 4\n  lora_alpha: 8\nseed: 1\n")
    found = adapters.Recipe.read(file, {"options.r": 16, "train.learning_rate": 1e-4, "seed": 2, "output": "d"})
    assert found.options == {"r": 16, "lora_alpha": 8}
    assert found.train == {"learning_rate": 1e-4}
    assert (found.seed, found.output, found.model) == (2, "d", "a")
    assert adapters.Recipe.read(file).options == {"r": 4, "lora_alpha": 8}


def test_a_key_without_keys_of_its_own_cannot_be_reached_into() -> None:
    with pytest.raises(RequestError, match="'model' has no keys"):
        changed({"model": "a"}, {"model.name": "b"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such recipe"),
        (b"", "expected keys and values"),
        (b"- a\n", "expected keys and values"),
        (b"just text\n", "expected keys and values"),
        ("model: café\n".encode("latin-1"), "utf-8"),
    ],
    ids=["missing", "empty", "list", "text", "latin-1"],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RequestError, match=said) as caught:
        adapters.Recipe.read(file)
    assert str(file) in str(caught.value)


def test_a_recipe_does_not_change() -> None:
    made = adapters.Recipe(**NEEDED)
    with pytest.raises(ValueError, match="frozen"):
        made.seed = 3


def test_reading_and_checking_a_recipe_imports_no_torch(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: a\ndata: b\noutput: c\noptions: {r: 4}\n")
    program = (
        "import sys, adapters\n"
        "adapters.Recipe.read(sys.argv[1])\n"
        "try: adapters.Recipe.read(sys.argv[1], {'options.lora_r': 1})\n"
        "except adapters.RequestError as fault: print(fault)\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pandas', 'peft'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    said, modules = done.stdout.splitlines()
    assert "unknown option 'lora_r'" in said
    assert modules == "[]"


# ---------------------------------------------------------------------- running


def test_a_run_does_the_whole_job_and_its_own_recipe_repeats_it(base: str, rows: str, tmp_path: Path) -> None:
    said: list[str] = []
    plan = made(base, rows, tmp_path, options={"r": 4, "max_length": 16}, seed=3)
    results = plan.run(said.append)
    out = tmp_path / "out"
    assert results["output"] == str(out)
    assert results["rows"] == {"train": 48, "validation": 6, "test": 6}
    assert results["majority"]["accuracy"] == pytest.approx(1 / 3)
    for part in ("test", "majority", "untrained"):
        assert set(results[part]) >= {"accuracy", "macro_f1"}
    assert results["beat_baseline"] in (True, False)
    assert results["adapter_bytes"] == (out / "adapter_model.safetensors").stat().st_size
    assert results["adapter_bytes"] < results["backbone_bytes"]
    assert json.loads(json.dumps(results)) == results
    assert any("48 train, 6 validation, 6 test" in line for line in said)
    assert any("epoch 1 of 1" in line for line in said)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]

    loaded = adapters.load(out)
    assert loaded.strategy.r == 4
    assert loaded.task.labels == ("a", "b", "c")
    assert loaded.task.max_length == 16
    assert loaded.record.seed == 3

    again = adapters.Recipe.read(out / "run.yaml", {"output": str(tmp_path / "again")})
    assert again.model_dump(exclude={"output"}) == plan.model_dump(exclude={"output"})
    repeated = again.run(lambda line: None)
    assert weights(tmp_path / "again") == weights(out)
    assert repeated["test"] == results["test"]


def test_the_splits_that_the_data_has_are_kept(base: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "train.csv", tiny.rows(24))
    write_rows(folder / "dev.csv", tiny.rows(9, seed=1))
    write_rows(folder / "test.csv", tiny.rows(12, seed=2))
    results = made(base, str(folder), tmp_path, strategy="probe").run(lambda line: None)
    assert results["rows"] == {"train": 24, "validation": 9, "test": 12}
    named = {"train": str(folder / "train.csv"), "test": str(folder / "test.csv")}
    results = made(base, named, tmp_path, strategy="probe", validation=0.25).run(lambda line: None)
    assert results["rows"] == {"train": 18, "validation": 6, "test": 12}


def test_texts_that_stand_in_two_given_parts_are_said_and_stay(base: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "train.csv", tiny.rows(24))
    write_rows(folder / "test.csv", [*tiny.rows(6, seed=2), *tiny.rows(24)[4:8]])
    said: list[str] = []
    results = made(base, str(folder), tmp_path, strategy="probe").run(said.append)
    remark = next(line for line in said if "stand in train too" in line)
    assert remark.startswith("4 of 10 test rows stand in train too (first: test row 6, train row 4)")
    assert said.count(remark) == 1
    assert remark in results["notes"]
    assert results["rows"]["test"] == 10
    assert remark in json.loads((tmp_path / "out" / "adapter.json").read_text())["notes"]


def test_many_small_classes_are_divided_and_trained_on(base: str, tmp_path: Path) -> None:
    labels = [f"c{number}" for number in range(20)]
    rows = [{**row, "label": labels[number % 20]} for number, row in enumerate(tiny.rows(80))]
    said: list[str] = []
    results = made(base, write_rows(tmp_path / "rows.csv", rows), tmp_path, strategy="probe").run(said.append)
    assert results["rows"] == {"train": 64, "validation": 8, "test": 8}
    assert any("validation lacks 12 " in line and "test lacks 12 " in line for line in said)


ONE_LABEL: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "in all rows": (["a"] * 40, {}, "every training row has the label 'a'"),
    "in all rows, two are known": (["a"] * 40, {"labels": ["a", "b"]}, "every training row has the label 'a'.*b too"),
    "is known": (["a"] * 40, {"labels": ["a"]}, "one label alone"),
    "in the one row that is drawn": (["a", "b"] * 20, {"limit": 1}, "every training row has the label.*limit"),
}


@pytest.mark.parametrize("name", ONE_LABEL)
def test_a_choice_between_one_label_is_refused(name: str, base: str, tmp_path: Path) -> None:
    labels, change, said = ONE_LABEL[name]
    rows = [{**row, "label": label} for row, label in zip(tiny.rows(40), labels, strict=True)]
    data = write_rows(tmp_path / "rows.csv", rows)
    with pytest.raises((DataError, RequestError), match=said):
        made(base, data, tmp_path, strategy="probe", **change).run(lambda line: None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.csv"]


def test_a_run_without_a_test_measures_none(base: str, rows: str, tmp_path: Path) -> None:
    results = made(base, rows, tmp_path, strategy="probe", test=0).run(lambda line: None)
    assert results["rows"] == {"train": 54, "validation": 6}
    assert "test" not in results
    assert results["beat_baseline"] is None


def test_columns_are_renamed_and_labels_keep_the_order_that_is_given(base: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.csv", [{"review": r["text"], "stars": r["label"]} for r in tiny.rows(60)])
    columns = {"text": "review", "label": "stars"}
    made(base, data, tmp_path, strategy="probe", columns=columns, labels=["c", "a", "b"]).run(lambda line: None)
    assert adapters.load(tmp_path / "out").task.labels == ("c", "a", "b")


def test_a_limit_draws_training_rows_and_no_labels_are_lost(base: str, rows: str, tmp_path: Path) -> None:
    results = made(base, rows, tmp_path, strategy="probe", limit=2).run(lambda line: None)
    assert results["rows"] == {"train": 2, "validation": 6, "test": 6}
    assert adapters.load(tmp_path / "out").task.labels == ("a", "b", "c")


def test_a_run_over_several_labels_and_over_numbers(base: str, tmp_path: Path) -> None:
    several = [{**row, "label": {"a": "a", "b": "b|c", "c": "c"}[row["label"]]} for row in tiny.rows(60)]
    numbers = [{**row, "label": "abc".index(row["label"]) / 2} for row in tiny.rows(60)]
    results = made(
        base, write_rows(tmp_path / "s.csv", several), tmp_path, strategy="probe", options={"problem": "multi-label"}
    ).run(lambda line: None)
    assert results["metric"] == "macro_f1"
    results = made(
        base, write_rows(tmp_path / "n.csv", numbers), tmp_path, strategy="probe", options={"problem": "regression"}
    ).run(lambda line: None)
    assert results["metric"] == "mse"
    assert results["beat_baseline"] == (
        results["test"]["mse"] < min(results[k]["mse"] for k in ("majority", "untrained"))
    )
    assert adapters.load(tmp_path / "out").task.problem == "regression"


def test_what_is_too_small_to_divide_and_what_is_cut_is_said(base: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.csv", [*tiny.rows(60), {"text": "once only", "label": "d"}])
    said: list[str] = []
    made(base, data, tmp_path, strategy="probe", options={"max_length": 4}).run(said.append)
    assert any("too small" in line and '"d"' in line for line in said)
    assert any("longer than 4 tokens" in line for line in said)


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(base: str, rows: str, tmp_path: Path) -> None:
    train = {**QUICK, "num_train_epochs": 3}
    plan = made(base, rows, tmp_path, train=train)
    made(base, rows, tmp_path, train=train, output=str(tmp_path / "whole")).run(lambda line: None)

    def stop(line: str) -> None:
        if line.startswith("epoch 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan.run(stop)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match=r"interrupted run.*--resume.*--no-resume"):
        plan.run(lambda line: None)
    said: list[str] = []
    plan.run(said.append, resume=True)
    assert not any(line.startswith("epoch 1") for line in said)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "whole"]


# ---------------------------------------------------------------------- runs that cannot be

BAD_SETTINGS: list[dict[str, Any]] = [
    {"batch_size": 4},
    {"learning_rate": "fast"},
    {"learning_rate": -1.0},
    {"num_train_epochs": "many"},
    {"per_device_train_batch_size": 0},
    {"eval_strategy": "sometimes"},
    {"optim": "best"},
    {"lr_scheduler_type": "steep"},
    {"early_stopping_patience": "long"},
    {"warmup_steps": "some"},
]


@pytest.mark.parametrize("settings", BAD_SETTINGS, ids=str)
def test_a_training_setting_that_cannot_be_is_named(
    base: str, rows: str, tmp_path: Path, settings: dict[str, Any]
) -> None:
    name, value = next(iter(settings.items()))
    with pytest.raises(RequestError, match=f"{name}|{value}"):
        made(base, rows, tmp_path, train={**QUICK, **settings}).run(lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_every_unknown_training_setting_is_said_with_its_right_name(base: str, rows: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        made(base, rows, tmp_path, train={"batch_size": 4, "lr": 1e-3, "epochs": 2}).run(lambda line: None)
    for said in ("per_device_train_batch_size", "learning_rate", "num_train_epochs"):
        assert said in str(caught.value)


BAD_OPTIONS: list[dict[str, Any]] = [
    {"options": {"r": "big"}},
    {"options": {"max_length": "long"}},
    {"options": {"label_smoothing": "much"}},
    {"options": {"target_modules": 5}},
    {"options": {"target_modules": [5]}},
    {"options": {"layers_to_transform": "top"}},
    {"options": {"rank_pattern": 5}},
    {"options": {"rank_pattern": {"(": 5}}},
    {"options": {"use_rslora": "no"}},
    {"options": {"use_dora": "no"}},
    {"options": {"class_weights": {"a": "x", "b": 1, "c": 1}}},
    {"options": {"pattern": [5]}, "strategy": "freeze"},
    {"options": {"pattern": []}, "strategy": "freeze"},
    {"options": {"config": {"peft_type": "IA3", "nope": 1}}, "strategy": "peft"},
    {"options": {}, "strategy": "peft"},
    {"load": {"dtype": "float99"}},
    {"load": {"nonsense": 1}},
    {"quantization": "nf5"},
    {"validation": 0.6, "test": 0.6},
]


@pytest.mark.parametrize("change", BAD_OPTIONS, ids=str)
def test_an_option_that_cannot_be_is_refused_and_nothing_is_left(
    base: str, rows: str, tmp_path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(RequestError) as caught:
        made(base, rows, tmp_path, **change).run(lambda line: None)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_bad_rows_are_named_by_their_number_in_the_file(base: str, tmp_path: Path) -> None:
    content = tiny.rows(60)
    for number, fault in ((7, {"label": ""}), (41, {"text": " "})):
        bad = [dict(row) for row in content]
        bad[number] |= fault
        data = write_rows(tmp_path / "rows.csv", bad)
        with pytest.raises(DataError, match=rf"row {number}\b"):
            made(base, data, tmp_path, strategy="probe").run(lambda line: None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.csv"]


def test_a_bad_row_of_the_test_part_says_so_and_leaves_nothing(base: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "train.csv", tiny.rows(30))
    write_rows(folder / "test.csv", [*tiny.rows(6, seed=1), {"text": "the parcel", "label": "zzz"}])
    with pytest.raises(DataError, match=r"unknown label 'zzz'.*row 6") as caught:
        made(base, str(folder), tmp_path, strategy="probe").run(lambda line: None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]
    assert "test" in str(caught.value)


def test_numbers_as_labels_are_met_with_the_word_regression(base: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.csv", [{**row, "label": number / 7} for number, row in enumerate(tiny.rows(60))])
    with pytest.raises(DataError, match="problem='regression'"):
        made(base, data, tmp_path).run(lambda line: None)


def test_data_without_training_rows_is_refused(base: str, rows: str, tmp_path: Path) -> None:
    with pytest.raises(AdaptersError, match="train"):
        made(base, {"test": rows}, tmp_path).run(lambda line: None)


def test_an_output_that_holds_something_else_is_refused_first(base: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(AdaptersError, match=r"already holds something else.*thesis\.txt"):
        made(base, "nowhere.csv", tmp_path).run(lambda line: None)
    assert (out / "thesis.txt").read_text() == "years of work"


def test_an_output_below_a_file_is_refused(base: str, rows: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdaptersError, match="file"):
        made(base, rows, tmp_path, output=str(tmp_path / "file" / "out"), strategy="probe").run(lambda line: None)


def test_a_finished_run_is_replaced_whole(base: str, rows: str, tmp_path: Path) -> None:
    made(base, rows, tmp_path).run(lambda line: None)
    made(base, rows, tmp_path, strategy="probe").run(lambda line: None)
    names = {entry.name for entry in (tmp_path / "out").iterdir()}
    assert "adapter_config.json" not in names  # LoRA's; the probe writes none
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["strategy"] == "probe"
