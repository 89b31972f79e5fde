"""Every fault of a recipe and its data at once, with its place and remedy, and without torch."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from typer.testing import CliRunner
from warm_host import environment

from adapters import fitness, installed, quantize, settings, survey
from adapters.adapt import STRATEGIES, adapt, row_of, task_class
from adapters.cli import app
from adapters.errors import AdaptersError, RequestError
from adapters.recipe import Recipe
from adapters.tasks import TASKS
from adapters.validation import Report, validate

HEAVY = {"torch", "transformers", "peft", "sklearn", "scipy", "bitsandbytes", "accelerate"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.folder("bert", tmp_path_factory.mktemp("base") / "bert")


def rows_in(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def written(folder: Path, base: str, text: str = "", rows: list[dict[str, Any]] | None = None, **keys: Any) -> Path:
    data = rows_in(folder / "rows.csv", tiny.rows(60) if rows is None else rows)
    document = {"model": base, "data": data, "output": str(folder / "out"), **keys}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in document.items() if v is not None}, sort_keys=False) + text)
    return file


def said(report: Report) -> str:
    return "\n".join(f"{fault.where}: {fault.what}" for fault in report.faults)


# ---------------------------------------------------------------------- what is fine


def test_a_recipe_without_faults_says_what_is_fine(base: str, tmp_path: Path) -> None:
    report = validate(written(tmp_path, base, options={"r": 4}, train={"learning_rate": 1e-3}))
    assert report.faults == ()
    assert report.exit_code == 0
    assert sum(report.rows.values()) == 60
    assert report.rows["validation"] == report.rows["test"] == 6
    assert "drawn" in report.fine["rows"]
    assert all(label in report.fine["labels"] for label in tiny.LABELS)
    assert "tokens" in report.fine["length"]
    assert report.lines()[-1] == f"next      adapters train {tmp_path / 'recipe.yaml'}"


def test_it_says_the_parts_that_a_run_has(base: str, tmp_path: Path) -> None:
    file = written(tmp_path, base, train={"max_steps": 1, "report_to": "none"}, validation=0.2)
    results = Recipe.read(file).run(lambda line: None)
    assert validate(file).rows == results["rows"]


# ---------------------------------------------------------------------- the recipe


def test_all_faults_come_at_once_each_with_its_line(base: str, tmp_path: Path) -> None:
    text = """\
modell: x
task: text-classification
strategy: lora
strategy: dora
options:
  lora_r: 8
  r: "16"
  max_lenght: 5
  label_smoothing: 2
train:
  epochs: 3
  learning_rate: "1e-4"
  bf16: "true"
  fp16: true
  lr_scheduler_type: cosin
  eval_steps: 3
  eval_strategy: epoch
  seed: 1
  seed: 2
  max_grad_norm: big
quantization: nf5
limit: -1
"""
    report = validate(written(tmp_path, base, text))
    lines = dict(enumerate((tmp_path / "recipe.yaml").read_text().splitlines(), 1))
    found = {}
    for fault in report.faults:
        number = re.search(r"line (\d+)", fault.where)
        assert number is not None, fault
        found.setdefault(lines[int(number[1])].split(":")[0].strip(), []).append(fault.what)
    wanted = {
        "modell": "Did you mean 'model'",
        "strategy": "stands twice",
        "lora_r": "The name here is 'r'",
        "r": "write 16 without quotes",
        "max_lenght": "Did you mean 'max_length'",
        "label_smoothing": "a share from 0",
        "epochs": "num_train_epochs",
        "learning_rate": "write 1e-4 without quotes",
        "bf16": "write true without quotes",
        "lr_scheduler_type": "Did you mean 'cosine'",
        "train": "eval_steps beside another strategy",
        "seed": "stands twice",
        "max_grad_norm": "expected a number; found 'big'",
        "quantization": "Did you mean 'nf4'",
        "limit": "greater than 0",
    }
    assert found.keys() == wanted.keys()
    for key, part in wanted.items():
        assert any(part in what for what in found[key]), (key, found[key])
    assert report.exit_code == 2


def test_settings_that_cannot_stand_together_are_said(base: str, tmp_path: Path) -> None:
    train = {"fp16": True, "bf16": True, "greater_is_better": True, "remove_unused_columns": True}
    report = validate(written(tmp_path, base, train=train))
    assert "two precisions at once" in said(report)
    assert "greater_is_better without its metric" in said(report)
    assert "fixed here" in said(report)
    assert len(report.faults) == 3


def test_changes_of_the_command_line_are_looked_at_too(base: str, tmp_path: Path) -> None:
    file = written(tmp_path, base, options={"rr": 1})
    assert len(validate(file).faults) == 1
    report = validate(file, {"options.rr": 2, "train.epochs": 1})
    assert [fault.where for fault in report.faults] == ["--set options.rr", "--set train.epochs"]


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"task": "text-clasification"}, "Did you mean 'text-classification'"),
        ({"strategy": "lroa"}, "Did you mean 'lora'"),
        ({"strategy": "qlora", "load": {"device_map": {"": "disk"}}}, "packed to 4 bits is not offloaded"),
        ({"quantization": "nf4", "load": {"device_map": {"bert": 0, "classifier": "cpu"}}}, "is not offloaded"),
        ({"strategy": "freeze", "options": {"layers": 7}}, "expected 1 to"),
        ({"strategy": "freeze", "options": {"layers": 1, "pattern": "x"}}, "exclude each other"),
        ({"options": {"r": 0}}, "a whole number > 0"),
        ({"options": {"init_lora_weights": "pisa"}}, "init_lora_weights"),
        ({"options": {"layers_to_transform": [0, 9]}}, "blocks that are not there"),
        ({"processor": {"size": 1}}, "only an image processor"),
        ({"model": "/nowhere/at/all"}, "no such model folder"),
        ({"task": "seq2seq"}, "has a head for seq2seq"),
        ({"task": "image-classification"}, "has a head for image-classification"),
        ({"strategy": "probe", "task": "causal-lm"}, "no head to train"),
        ({"labels": ["a", "a"]}, "a label twice"),
        ({"task": "causal-lm", "labels": ["a"]}, "has no labels"),
        ({"validation": 0.6, "test": 0.5}, "wrong shares"),
        ({"data": 5}, "data"),
        ({"output": None}, "the key 'output' is missing"),
    ],
)
def test_what_is_asked_for_and_cannot_be(base: str, tmp_path: Path, keys: dict[str, Any], part: str) -> None:
    report = validate(written(tmp_path, base, **keys))
    assert part in said(report)
    assert report.exit_code == 2


def test_an_output_that_is_not_ours_is_a_fault(base: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("mine")
    assert "already holds something else" in said(validate(written(tmp_path, base)))


def test_checkpoints_of_an_interrupted_run_are_a_fault(base: str, tmp_path: Path) -> None:
    (tmp_path / ".out.run" / "checkpoint-2").mkdir(parents=True)
    assert "an interrupted run left checkpoints" in said(validate(written(tmp_path, base)))


def test_an_id_that_is_not_on_this_machine_is_said(tmp_path: Path) -> None:
    report = validate(written(tmp_path, "some/model"))
    assert report.faults == ()
    assert "not on this machine" in report.remarks[0].what


def test_no_recipe_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such recipe"):
        validate(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(RequestError, match="not a recipe"):
        validate(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [b\n")
    with pytest.raises(RequestError, match="broken YAML"):
        validate(tmp_path / "broken.yaml")


@pytest.mark.parametrize(
    ("kind", "strategy", "task"),
    [
        ("llama", "bitfit", "causal-lm"),
        ("albert", "freeze", "text-classification"),
        ("gpt2", "oft", "causal-lm"),
        ("gpt2", "probe", "causal-lm"),
        ("t5", "lora", "masked-lm"),
        ("bart", "lora", "masked-lm"),
        ("vit", "lora", "text-classification"),
    ],
)
def test_what_the_config_rules_out_is_what_adapt_refuses(kind: str, strategy: str, task: str, tmp_path: Path) -> None:
    folder = tiny.folder(kind, tmp_path / kind)
    found = fitness.sketch(folder, {})
    assert found is not None
    assert list(fitness.faults(found, task_class(task), row_of(strategy), {}))
    with pytest.raises(AdaptersError):
        adapt(folder, strategy, task=task, labels=list(tiny.LABELS) if "classification" in task else None)


@pytest.mark.parametrize("kind", tiny.DECODERS)
def test_what_fits_is_not_refused(kind: str, tmp_path: Path) -> None:
    found = fitness.sketch(tiny.folder(kind, tmp_path / kind), {})
    assert found is not None
    assert found.depth == 3
    assert found.positions is not None
    assert list(fitness.faults(found, task_class("causal-lm"), row_of("lora"), {"layers_to_transform": [0, 2]})) == []


# ---------------------------------------------------------------------- the data


def test_every_bad_row_of_every_part_is_told(base: str, tmp_path: Path) -> None:
    train = tiny.rows(40)
    train[3] = {**train[3], "text": " "}
    train[9] = {**train[9], "text": ""}
    train[12] = {**train[12], "label": ""}
    other = [
        {"text": "one", "label": "neww"},
        {"text": "two", "label": train[0]["label"]},
        {"text": train[5]["text"], "label": train[5]["label"]},
        {"text": "", "label": train[5]["label"]},
    ]
    data = {
        "train": rows_in(tmp_path / "a.csv", train),
        "validation": rows_in(tmp_path / "b.csv", other),
        "test": str(tmp_path / "gone.csv"),
    }
    report = validate(written(tmp_path, base, data=data))
    text = said(report)
    assert "gone.csv" in text
    assert "train: an empty text (rows 3, 9: 2 of 40; column 'text')" in text
    assert "train: the label is missing (row 12: 1 of 40; column 'label')" in text
    assert "validation: the label 'neww' never occurs in train (row 0" in text
    assert "validation: an empty text (row 3: 1 of 4" in text
    assert len(report.faults) == 5
    notes = "\n".join(fault.what for fault in report.remarks)
    assert "validation row 2, train row 5" in notes  # by the numbers in the files, bad rows counted


def test_repeated_rows_and_answers_that_disagree_are_said(base: str, tmp_path: Path) -> None:
    one, two = tiny.LABELS[:2]
    rows = [{"text": f"text {n}", "label": (one, two)[n % 2]} for n in range(40)]
    rows[30] = rows[4]
    rows[31] = {**rows[5], "label": one}
    report = validate(written(tmp_path, base, rows=rows))
    assert report.exit_code == 0
    assert any("rows 30, 31; 1 of them with another answer: row 31" in fault.what for fault in report.remarks)


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        ({"text": "reviw"}, "Did you mean 'review'"),
        ({"txt": "review"}, "the task has no column 'txt'"),
        ({}, "there is no column"),
    ],
)
def test_columns_that_are_not_there(base: str, tmp_path: Path, columns: dict[str, str], part: str) -> None:
    rows = [{"review": row["text"], "mood": row["label"]} for row in tiny.rows(20)]
    report = validate(written(tmp_path, base, rows=rows, columns=columns))
    assert part in said(report)
    assert report.exit_code == (2 if columns else 3)


def test_both_columns_that_are_missing_are_told(base: str, tmp_path: Path) -> None:
    report = validate(written(tmp_path, base, columns={"text": "a", "label": "b"}))
    assert "no column 'a'" in said(report)
    assert "no column 'b'" in said(report)


def test_rows_of_one_label_and_rare_labels(base: str, tmp_path: Path) -> None:
    one, two = tiny.LABELS[:2]
    rows = [{"text": f"text {n}", "label": one} for n in range(40)]
    assert "every training row has the label" in said(validate(written(tmp_path, base, rows=rows)))
    rows[7]["label"] = two
    report = validate(written(tmp_path, base, rows=rows))
    assert report.faults == ()
    assert any("balanced" in fault.what for fault in report.remarks)


def test_tags_that_do_not_fit_their_words(base: str, tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "b"], "tags": ["O", "B-X"]} for _ in range(20)]
    for number in (4, 5, 11):
        rows[number] = {"tokens": ["a", "b"], "tags": ["O"]}
    rows[12] = {"tokens": [], "tags": []}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = validate(written(tmp_path, base, data=str(tmp_path / "rows.jsonl"), task="token-classification"))
    assert "row 4, column 'tags'" in said(report)
    assert "3 rows are so, the others: rows 5, 11" in said(report)
    assert "row 12, column 'tokens'" in said(report)
    assert report.exit_code == 3


def test_conversations_that_cannot_be_read(base: str, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows: list[Any] = [{"messages": turns} for _ in range(12)]
    rows[2] = {"messages": [{"role": "usr", "content": "a"}]}
    rows[7] = {"messages": []}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = validate(written(tmp_path, base, data=str(tmp_path / "rows.jsonl"), task="causal-lm"))
    assert "unknown role 'usr'" in said(report)
    assert "row 7" in said(report)


def test_all_pictures_are_opened(tmp_path: Path) -> None:
    from PIL import Image

    for label in ("cat", "dog"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "pictures" / label / f"{number:02}.png")
    folder = tiny.folder("vit", tmp_path / "vit")
    keys = {"data": str(tmp_path / "pictures"), "task": "image-classification"}
    assert validate(written(tmp_path, folder, **keys)).fine["pictures"] == "all 24 opened"
    for name in ("cat/03.png", "dog/07.png"):
        (tmp_path / "pictures" / name).write_bytes(b"no picture")
    text = said(validate(written(tmp_path, folder, **keys)))
    assert "03.png" in text
    assert "2 rows are so" in text


def test_halving_finds_every_row_and_stops_at_many() -> None:
    def probe(rows: Dataset) -> None:
        for number, value in enumerate(rows["value"]):
            if value < 0:
                raise RequestError(f"a negative value (row {number}); found {value}")

    values = [1] * 200
    for bad in (0, 17, 18, 199):
        values[bad] = -bad - 1
    part = survey.Part(Dataset.from_dict({"value": values}), list(range(1000, 1200)))
    (group,) = survey.unusable(part, probe)
    assert group.places == (0, 17, 18, 199)
    assert "row 1000" in group.what
    assert group.shown == "rows 1017, 1018, 1199"
    (many,) = survey.unusable(survey.Part(Dataset.from_dict({"value": [-1] * 500}), range(500)), probe)
    assert len(many.places) == survey.MOST
    assert "at least" in str(many)


def test_class_numbers_have_names(base: str, tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"text": [f"t {n}" for n in range(20)], "label": [n % 2 for n in range(20)]}, features)
    rows.to_parquet(tmp_path / "rows.parquet")
    report = validate(written(tmp_path, base, data=str(tmp_path / "rows.parquet")))
    assert report.faults == ()
    assert report.fine["labels"] == "2 labels: no 10, yes 10"


# ---------------------------------------------------------------------- without torch, and the same as transformers


def test_it_imports_no_torch(base: str, tmp_path: Path) -> None:
    file = written(tmp_path, base, train={"learning_rate": 1e-4, "optim": "adamw_torch"})
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "adapters", "validate", str(file)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not loaded & HEAVY
    assert "adapters" in loaded


def test_a_recipe_alone_needs_no_data_library(base: str, tmp_path: Path) -> None:
    """Rows that are nowhere: what is wrong with the recipe is told without datasets being looked into."""
    (tmp_path / "recipe.yaml").write_text(f"model: {base}\noutput: {tmp_path}/out\n")
    code = f"import sys; from adapters.validation import validate; validate({str(tmp_path / 'recipe.yaml')!r})\n"
    code += "print(sorted({'datasets', 'pandas', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout == "[]\n"


def test_settings_are_those_of_the_installed_transformers() -> None:
    kind = transformers.TrainingArguments
    assert installed.settings().keys() == {entry.name for entry in dataclasses.fields(kind) if entry.init}
    plain = kind(output_dir="unused")
    for name, setting in installed.settings().items():
        value = getattr(plain, name)
        if name != "accelerator_config":  # which transformers makes an object of
            assert setting.fits(getattr(value, "value", value)), name
    schedules = transformers.trainer_utils.SchedulerType
    assert set(installed.settings()["lr_scheduler_type"].choices) == {entry.value for entry in schedules}


def test_tables_of_models_are_those_of_the_installed_transformers() -> None:
    for task in TASKS.values():
        table = getattr(transformers, task.auto_class)._model_mapping._model_mapping
        wanted = {kind: (name,) if isinstance(name, str) else tuple(name) for kind, name in table.items()}
        assert dict(installed.heads(task.auto_class)) == wanted
    known = installed.model_types().union(*(installed.heads(task.auto_class) for task in TASKS.values()))
    assert set(transformers.CONFIG_MAPPING._mapping) <= known
    assert set(fitness.QUANTIZATIONS) == set(quantize.KINDS)


@pytest.mark.parametrize(
    ("name", "value", "fine"),
    [
        ("bf16", "false", False),
        ("bf16", False, True),
        ("max_steps", 1.5, False),
        ("max_steps", 10, True),
        ("warmup_steps", 0.1, True),
        ("lr_scheduler_type", "cosine", True),
        ("lr_scheduler_kwargs", {"num_cycles": 2}, True),
        ("lr_scheduler_kwargs", 3, False),
        ("optim", "adamw_tourch", False),
        ("report_to", "none", True),
        ("report_to", "wandbb", False),
        ("eval_steps", None, True),
        ("weight_decay", None, False),
        ("fsdp", ["full_shard"], True),
        ("per_device_train_batch_size", True, False),
        ("prefix_cache", "bfloat16", True),
        ("early_stopping_patience", 0, False),
    ],
)
def test_a_settings_value_fits_or_not(name: str, value: Any, fine: bool) -> None:
    assert (settings.faults({name: value}) == []) is fine


def test_every_need_of_a_strategy_is_one_that_is_looked_at() -> None:
    needs = {row.needs for row in map(row_of, STRATEGIES) if row.needs}
    assert needs == {"a head", "biases", "own blocks", "linear maps"}


def test_a_recipe_that_divides_the_model_says_how_it_is_started(base: str, tmp_path: Path) -> None:
    file = written(tmp_path, base, train={"fsdp": True, "fsdp_config": {"version": 2}})
    report = validate(file)
    assert report.faults == ()
    assert report.lines()[-1] == f"next      accelerate launch --num_processes N -m adapters train {file}"
    assert report.to_json()["next"] == report.command()
    wrong = validate(file, {"train.fsdp_config": {"version": 1, "cpu_offload": True}, "train.optim": "adafactor"})
    assert len(wrong.faults) == 3
    assert "--fsdp_version 2" in said(wrong)
    assert "adamw_torch" in said(wrong)
    other = validate(written(tmp_path, base, train={"deepspeed": {"zero_optimization": {"stage": 3}}}))
    assert "train.deepspeed: a setting of DeepSpeed that does not work here" in said(other)
    assert "say fsdp: true" in said(other)
    plain = validate(written(tmp_path, base))
    assert plain.lines()[-1] == f"next      adapters train {file}"


# ---------------------------------------------------------------------- the command


def test_the_command_says_it_in_order_and_ends_with_its_code(base: str, tmp_path: Path) -> None:
    runner = CliRunner()
    fine = runner.invoke(app, ["validate", str(written(tmp_path, base))])
    assert fine.exit_code == 0
    rows = [*tiny.rows(30), {"text": "", "label": tiny.LABELS[0]}]
    file = written(tmp_path, base, rows=rows)
    data = runner.invoke(app, ["validate", str(file), "--json"])
    assert data.exit_code == 3
    document = json.loads(data.stdout)
    assert document["ok"] is False
    assert [fault["kind"] for fault in document["faults"]] == ["data"]
    both = runner.invoke(app, ["validate", str(file), "--set", "options.lora_r=4"])
    assert both.exit_code == 2
    assert both.stdout.splitlines()[0].startswith("1. --set options.lora_r: unknown option")
    assert both.stdout.splitlines()[1].startswith("2. train: an empty text")
