"""Recipes whose training rows are streamed: read shard by shard, never held whole, dealt, resumed, or refused."""

from __future__ import annotations

import gzip
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import tiny
from many import Ended
from test_launched import interrupted, program, quiet_model
from test_recipe import base, weights, write_rows
from typer.testing import CliRunner

import adapters
from adapters import data, hardware, inflow, ranks, rowfiles, streaming
from adapters.cli import app
from adapters.drafting import draft, write
from adapters.errors import AdaptersError, DataError, RequestError
from adapters.recipe import Recipe
from adapters.sweep import Sweep
from adapters.validation import validate

__all__ = ["base", "interrupted", "program"]
KINDS = ("jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz", "csv.gz")
NAMED = list(tiny.LABELS)
STEPS: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 5e-3}


def write_shard(file: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of rows, of the kind that its name says."""
    kind = file.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=7)
        return file
    mark = "\t" if kind == "tsv" else ","
    lines = [json.dumps(row) for row in rows]
    if kind in ("csv", "tsv"):
        lines = [mark.join(line) for line in (rows[0], *(row.values() for row in rows))]
    text = "".join(f"{line}\n" for line in lines).encode()
    file.write_bytes(gzip.compress(text) if file.name.endswith(".gz") else text)
    return file


def shards(folder: Path, kind: str = "jsonl", sizes: tuple[int, ...] = (40, 25, 60), seed: int = 0) -> list[Path]:
    """Files of rows whose texts are all different."""
    texts, made, begin = tiny.rows(sum(sizes), seed=seed), [], 0
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        made.append(write_shard(folder / f"part{number}.{kind}", texts[begin : begin + size]))
        begin += size
    return made


def streamed(base: str, folder: Path, data: Any, **changes: Any) -> Recipe:
    """A recipe over a stream."""
    keys = {"model": base, "data": data, "output": str(folder / "out"), "streaming": True, "labels": NAMED}
    return Recipe(**keys | {"train": STEPS} | changes)


def all_of(source: Any) -> list[dict[str, Any]]:
    """Every row of the stream of a source, shard after shard."""
    stream, _ = streaming.opened(source, print)
    return [dict(row) for shard in range(stream.shards) for row in stream.rows(shard, 0)]


# ---------------------------------------------------------------------- what is read


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_has_the_rows_that_a_whole_read_has(kind: str, tmp_path: Path) -> None:
    files = shards(tmp_path, kind)
    whole = data.read(str(tmp_path / f"*.{kind}"))["train"].to_list()
    assert len(whole) == 125
    assert all_of(str(tmp_path / f"*.{kind}")) == whole
    assert all_of([str(file) for file in files]) == whole
    assert data.read(list(map(str, files)))["train"].to_list() == whole
    assert all_of({"train": [str(files[0]), str(tmp_path / f"part[12]*.{kind}")]}) == whole
    stream, _ = streaming.opened(str(files[1]), print)
    assert (stream.shards, stream.name(0)) == (1, "the stream")
    about = [rowfiles.about(file) for file in files]
    assert about == [40, 25, 60] or (kind.endswith("gz") and sum(about) > 0)


def test_a_folder_is_streamed_by_its_parts(tmp_path: Path) -> None:
    rows = tiny.rows(30)
    for number in range(2):
        write_shard(tmp_path / f"train-0000{number}-of-00002.jsonl", rows[10 * number : 10 * number + 10])
    write_shard(tmp_path / "validation.csv", rows[20:])
    stream, others = streaming.opened(str(tmp_path), print)
    assert stream.shards == 2
    assert [dict(row) for _, row in stream.first(99)] == rows[:20]
    assert others["validation"].to_list() == rows[20:]
    assert list(others) == ["validation"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "jsonl.gz"])
def test_no_file_is_held_whole(kind: str, tmp_path: Path) -> None:
    rows = [{"text": f"{number:06} " + "the same words again " * 20, "label": "a"} for number in range(20_000)]
    file = tmp_path / f"long.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=500, compression=None)
    else:
        write_shard(file, rows)
    del rows
    size = 20_000 * 430
    pool = pyarrow.default_memory_pool()
    before, arrow, count = pool.bytes_allocated(), 0, 0
    tracemalloc.start()
    try:
        for _, row in rowfiles.rows_of(file):
            count += len(row)
            arrow = max(arrow, pool.bytes_allocated() - before)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 40_000
    assert most + arrow < size / 4


def test_classes_that_parquet_names_are_the_labels(base: str, tmp_path: Path) -> None:
    named = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "c", "a"])})
    for number in range(2):
        rows = tiny.rows(20, seed=number)
        datasets.Dataset.from_list(rows, features=named).to_parquet(str(tmp_path / f"{number}.parquet"))
    recipe = streamed(base, tmp_path, str(tmp_path / "*.parquet"), labels=None)
    recipe.run(lambda line: None)
    assert adapters.load(recipe.output, base).task.labels == ("b", "c", "a")


# ---------------------------------------------------------------------- what is refused

FAULTS: dict[str, tuple[str, Callable[[Path], Any], type[AdaptersError], str]] = {
    "no such shard": ("jsonl", lambda f: [str(f / "part0.jsonl"), str(f / "part9.jsonl")], RequestError,
                      r"no such file or folder \(.*part9\.jsonl\)"),
    "no file fits": ("jsonl", lambda f: str(f / "other*.jsonl"), RequestError, r"no file fits the pattern \(.*other\*"),
    "other columns": ("jsonl", lambda f: write_shard(f / "part1.jsonl", [{"text": "x", "lable": "a"}]), DataError,
                      r"\(.*part1\.jsonl, line 1\); expected label, text; found lable, text. Check the spelling"),
    "other columns further on": ("csv", lambda f: (f / "part2.csv").write_text("text,label,more\nx,a,b\n"), DataError,
                                 r"other columns than the rest \(.*part2\.csv, line 2\)"),
    "other types": ("parquet", lambda f: write_shard(f / "part2.parquet", [{"text": "x", "label": 3}]), DataError,
                    r"files of one part with different columns \(.*part2\.parquet\)"),
    "a broken line": ("jsonl", lambda f: spoilt(f / "part2.jsonl", 30, b'{"text": \n'), DataError,
                      r"broken JSON \(.*part2\.jsonl, line 31\)"),
    "a key twice": ("jsonl", lambda f: spoilt(f / "part2.jsonl", 30, b'{"text": "x", "text": "y"}\n'), DataError,
                    r"broken JSON \(.*part2\.jsonl, line 31\); found the key 'text' stands twice"),
    "not a number": ("jsonl", lambda f: spoilt(f / "part2.jsonl", 30, b'{"text": "x", "label": NaN}\n'), DataError,
                     r"not a finite number \(.*part2\.jsonl, line 31, column 'label'\)"),
    "no record": ("jsonl", lambda f: spoilt(f / "part2.jsonl", 30, b'["text"]\n'), DataError,
                  r"a row that is no record \(.*part2\.jsonl, line 31\)"),
    "a ragged row": ("csv", lambda f: spoilt(f / "part2.csv", 30, b"one,two,three\n"), DataError,
                     r"another number of fields than the header \(.*part2\.csv, line 31\)"),
    "an open quote": ("csv", lambda f: spoilt(f / "part2.csv", 30, b'"one,a\n'), DataError,
                      r"cannot read the table \(.*part2\.csv, row 30, line 61\)"),
    "another separator": ("csv", lambda f: (f / "part0.csv").write_text("text;label\nx;a\n"), DataError,
                          r"one column whose name holds a separator \(.*part0\.csv"),
    "no utf-8": ("jsonl", lambda f: spoilt(f / "part2.jsonl", 30, b'{"text": "\xff"}\n'), DataError,
                 r"not utf-8 \(.*part2\.jsonl, line 31, byte 11\)"),
    "a truncated archive": ("jsonl.gz", lambda f: cut(f / "part1.jsonl.gz"), DataError,
                            r"cannot read the file \(.*part1\.jsonl\.gz"),
    "a truncated table": ("parquet", lambda f: cut(f / "part1.parquet"), DataError,
                          r"cannot read the parquet file \(.*part1\.parquet\)"),
    "one list": ("json", lambda f: (f / "part1.json").write_text('[{"text": "x", "label": "a"}]'), DataError,
                 r"one list of records \(.*part1\.json\).*a record a line"),
    "paragraphs": ("txt", lambda f: None, RequestError, r"not read row by row \(.*part0\.txt\); expected jsonl"),
    "several kinds": ("jsonl", lambda f: [str(f / "part0.jsonl"), str(write_shard(f / "part3.csv", tiny.rows(3)))],
                      RequestError, r"files of several kinds for one part \(data\); found part0\.jsonl and part3\.csv"),
    "no files": ("jsonl", lambda f: ["part0"], RequestError, r"not a list of files \(data\).*found 'part0'"),
    "nothing": ("jsonl", lambda f: [(f / f"part{n}.jsonl").write_bytes(b"") for n in range(3)], DataError,
                r"the data is empty \(.*part0\.jsonl, "),
}  # fmt: skip


ASKED_FOR = ("no such shard", "no file fits", "several kinds", "no files")  # the others spoil what a pattern fits


def spoilt(file: Path, line: int, what: bytes) -> None:
    """Put a line in the place of one."""
    lines = file.read_bytes().splitlines(keepends=True)
    lines[line] = what
    file.write_bytes(b"".join(lines))


def cut(file: Path) -> None:
    """Leave out the end of a file."""
    file.write_bytes(file.read_bytes()[:-40])


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_read_is_named_with_file_and_line(name: str, tmp_path: Path) -> None:
    kind, spoil, error, said = FAULTS[name]
    shards(tmp_path, kind)
    changed = spoil(tmp_path)
    asked = changed if name in ASKED_FOR else str(tmp_path / f"part*.{kind}")
    with pytest.raises(error, match=said):
        all_of(asked)


def test_an_empty_file_among_others_is_said(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "part1.jsonl").write_bytes(b"")
    said: list[str] = []
    stream, _ = streaming.opened(str(tmp_path / "*.jsonl"), said.append)
    assert said == ["1 of 3 files hold no rows: part1.jsonl"]
    assert len(stream.first(999)) == 100


ASKED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no steps": ({"train": {"num_train_epochs": 3}}, "max_steps", "nobody knows how many rows a stream has"),
    "a limit": ({"limit": 5}, "limit", "train.max_steps says how many are read"),
    "weights": ({"options": {"class_weights": "balanced"}}, "class_weights", "counted over all rows"),
    "a warm head": ({"train": {**STEPS, "warm_head": True}}, "warm_head", "a head is solved on all rows"),
    "a share": ({"validation": 0.2}, "validation", "a share of a stream cannot be drawn"),
    "a share to test": ({"test": 0.2}, "test", "Name a file of them: data: {train: ..., test: ...}"),
    "no labels": ({"labels": None}, "labels", "in the first 125 rows a, b, c. Say labels: [a, b, c]"),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_a_stream_cannot_do_is_refused_by_validate_and_by_a_run(name: str, base: str, tmp_path: Path) -> None:
    changes, key, said = ASKED[name]
    shards(tmp_path)
    recipe = streamed(base, tmp_path, str(tmp_path / "*.jsonl"), **changes)
    with pytest.raises(RequestError, match=re.escape(said)):
        recipe.run(lambda line: None)
    assert not list(tmp_path.glob(".out*"))
    file = written(recipe, tmp_path)
    report = validate(file)
    assert report.exit_code == 2
    (fault,) = report.faults
    assert said in fault.what
    assert key in fault.where or key in fault.what


def written(recipe: Recipe, folder: Path) -> Path:
    """A recipe as its file."""
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe.model_dump(exclude_unset=True)))
    return file


def test_other_settings_of_a_stream_are_told_at_once(base: str, tmp_path: Path) -> None:
    shards(tmp_path)
    recipe = streamed(base, tmp_path, str(tmp_path / "*.jsonl"), train={}, limit=3)
    with pytest.raises(RequestError) as caught:
        recipe.run(lambda line: None)
    assert len(caught.value.faults) == 2


def test_pictures_named_by_path_are_refused(base: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "part0.csv", [{"image": "a.png", "label": "a"}, {"image": "b.png", "label": "b"}])
    recipe = streamed(base, tmp_path, str(tmp_path / "part0.csv"), task="image-classification")
    with pytest.raises(RequestError, match=r"a stream of pictures' names \(.*column 'image'"):
        recipe.run(lambda line: None)
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    recipe = streamed(base, tmp_path, str(tmp_path / "pictures"), task="image-classification")
    with pytest.raises(RequestError, match=r"a folder that is not read row by row"):
        recipe.run(lambda line: None)


def test_a_sweep_over_a_stream_is_refused(base: str, tmp_path: Path) -> None:
    shards(tmp_path)
    file = written(streamed(base, tmp_path, str(tmp_path / "*.jsonl")), tmp_path)
    with pytest.raises(RequestError, match=r"a sweep over a stream.*Sweep over a file of some of the rows"):
        Sweep.read(file, {"options.r": [2, 4]})
    write_rows(tmp_path / "rows.csv", tiny.rows(40))
    with pytest.raises(RequestError, match="settings over different rows"):
        Sweep.read(file, {"streaming": [True, False]}, {"streaming": False})


# ---------------------------------------------------------------------- runs


def test_a_recipe_over_a_stream_is_the_trainers_own_run_over_it(base: str, tmp_path: Path) -> None:
    files = list(map(str, shards(tmp_path / "rows")))
    held, test = (write_rows(tmp_path / f"{name}.csv", tiny.rows(20, seed=seed)) for name, seed in (("v", 5), ("t", 6)))
    said: list[str] = []
    parts = {"train": str(tmp_path / "rows" / "*.jsonl"), "validation": held, "test": test}
    recipe = streamed(base, tmp_path, parts, train=STEPS | {"eval_steps": 2, "shuffle_buffer": 30})
    results = recipe.run(said.append)
    assert results["rows"] == {"train": None, "validation": 20, "test": 20}
    assert "rows: a stream of 3 files train, 20 validation, 20 test" in said
    assert any(re.match(r"step 2 of 6: .*validation loss", line) for line in said)
    assert results["beat_baseline"] in (True, False)
    out = Path(recipe.output)
    assert "a stream of rows" in (out / "report.html").read_text()
    assert "a stream of training rows from *.jsonl, v.csv, t.csv" in (out / "README.md").read_text()

    stream = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
    adapted = adapters.adapt(base, "lora", labels=NAMED)
    plain = {"output_dir": str(tmp_path / "run"), "eval_steps": 2, "shuffle_buffer": 30, "disable_tqdm": True}
    adapters.Trainer(adapted, STEPS | plain, stream, data.read(held)["train"]).train()
    adapters.save(adapted, tmp_path / "plain")
    assert weights(out) == weights(tmp_path / "plain")
    again = Recipe.read(out / "run.yaml", {"output": str(tmp_path / "again")})
    assert again.streaming
    again.run(lambda line: None)
    assert weights(tmp_path / "again") == weights(out)


def test_columns_are_renamed_in_all_parts_and_a_probe_is_stepped(base: str, tmp_path: Path) -> None:
    rows = [{"review": row["text"], "stars": row["label"], "id": "x"} for row in tiny.rows(60)]
    for number in range(2):
        write_shard(tmp_path / f"{number}.csv", rows[20 * number : 20 * number + 20])
    write_shard(tmp_path / "held.csv", rows[40:])
    parts = {"train": [str(tmp_path / "[01].csv")], "validation": str(tmp_path / "held.csv")}
    said: list[str] = []
    columns = {"text": "review", "label": "stars"}
    train = STEPS | {"max_steps": 20, "early_stopping_patience": 99}
    recipe = streamed(base, tmp_path, parts, columns=columns, strategy="probe", train=train)
    results = recipe.run(said.append)
    assert "train: in the first rows of the stream, detected: classification, 40 rows" in said
    assert any("no test rows: nothing is measured" in note for note in results["notes"])
    assert "the rows are a stream, of which no head is solved: it starts as it is drawn" in results["notes"]
    steps = [json.loads(line) for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in steps if event["event"] == "step"] == list(range(1, 21))
    measured = [event["step"] for event in steps if event["event"] == "evaluation" and event["part"] == "validation"]
    assert measured == list(range(2, 21, 2))  # after every tenth of the steps


def test_a_stream_of_the_hub(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {n: datasets.Dataset.from_list(tiny.rows(s, seed=s)) for n, s in (("train", 40), ("dev", 12), ("more", 3))}
    asked: list[Any] = []

    def load(*name: str, streaming: bool) -> Any:
        asked.append((*name, streaming))
        return datasets.IterableDatasetDict({n: rows.to_iterable_dataset(num_shards=2) for n, rows in given.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    said: list[str] = []
    results = streamed(base, tmp_path, "some/set:small").run(said.append)
    assert asked[0] == ("some/set", "small", True)
    assert results["rows"] == {"train": None, "validation": 12}
    assert any("left out the split 'more'" in line for line in said)
    del given["train"]
    with pytest.raises(DataError, match="no split to train on"):
        streaming.opened("some/set", said.append)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_prepared_is_named_wherever_it_was_mixed_to(
    workers: int, base: str, tmp_path: Path
) -> None:
    shards(tmp_path, sizes=(40, 2000, 40))
    spoilt(tmp_path / "part1.jsonl", 1500, b'{"text": "x", "label": "other"}\n')
    train = {**STEPS, "max_steps": 200, "per_device_train_batch_size": 16, "dataloader_num_workers": workers}
    recipe = streamed(base, tmp_path, str(tmp_path / "*.jsonl"), train=train)
    with pytest.raises(DataError) as caught:
        recipe.run(lambda line: None)
    assert str(caught.value).startswith(f"unknown label 'other' ({tmp_path}/part1.jsonl, row 1500, column 'label')")
    spoilt(tmp_path / "part1.jsonl", 1500, b"{broken\n")
    with pytest.raises(DataError, match=r"^broken JSON \(\S*/part1\.jsonl, line 1501\); found Expecting"):
        recipe.run(lambda line: None, resume=False)


def test_places_stand_for_the_numbers_of_rows() -> None:
    places = ["a, row 7", "b, row 0", "b, row 1"]
    assert inflow.placed("wrong (row 1, column 'x'); found 2", places) == "wrong (b, row 0, column 'x'); found 2"
    assert inflow.placed("list of rows, row 2 and rows 0, 1", places) == "b, row 1 and a, row 7, b, row 0"
    assert inflow.placed("validation row 1, row 9, rows", places) == "validation row 1, row 9, rows"


# ---------------------------------------------------------------------- commands


def test_validate_looks_at_the_first_rows_of_each_file(base: str, tmp_path: Path) -> None:
    shards(tmp_path, sizes=(1200, 1200, 3))
    spoilt(tmp_path / "part1.jsonl", 20, b'{"text": " ", "label": "a"}\n')
    spoilt(tmp_path / "part2.jsonl", 1, b'{"text": "x", "label": "d"}\n')
    spoilt(tmp_path / "part1.jsonl", 1000, b'{"text": "x", "label": "e"}\n')  # further on than anybody looks
    write_rows(tmp_path / "held.csv", tiny.rows(9))
    parts = {"train": str(tmp_path / "*.jsonl"), "validation": str(tmp_path / "held.csv")}
    report = validate(written(streamed(base, tmp_path, parts), tmp_path))
    assert report.exit_code == 3
    found = [fault.what for fault in report.faults]
    assert len(found) == 2
    assert f"an empty text ({tmp_path}/part1.jsonl, row 20: 1 of " in found[0]
    assert f"unknown label 'd' ({tmp_path}/part2.jsonl, row 1, column 'label')" in found[1]
    assert any("its first 1335 rows were looked at" in remark.what for remark in report.remarks), report.remarks
    assert report.fine["rows"] == "a stream of 3 files train, 9 validation"
    assert report.rows == {"validation": 9}
    shards(tmp_path, sizes=(30, 20, 3))
    report = validate(tmp_path / "recipe.yaml")
    assert report.exit_code == 0
    assert report.fine["labels"].startswith("in the first 53 rows 3 labels: ")


def test_a_plan_of_a_stream_keeps_nothing(base: str, tmp_path: Path) -> None:
    shards(tmp_path)
    recipe = streamed(base, tmp_path, str(tmp_path / "*.jsonl"), strategy="probe")
    plan = recipe.plan()
    assert hardware.STREAM in plan.notes
    assert plan.lines[0].cache == plan.lines[0].features == 0
    whole = hardware.of_recipe(recipe.model_copy(update={"streaming": False}).model_dump(exclude_unset=True))
    assert whole.lines[0].cache > 0


def test_a_draft_over_a_stream_runs_as_it_is(base: str, tmp_path: Path) -> None:
    shards(tmp_path / "rows", sizes=(300, 200, 100))
    write_rows(tmp_path / "held.csv", tiny.rows(9))
    sources = [f"train={tmp_path}/rows/*.jsonl", f"validation={tmp_path}/held.csv"]
    where: dict[str, Any] = {"model": base, "output": str(tmp_path / "out")}
    made = draft(sources, streamed=True, file=str(tmp_path / "recipe.yaml"), **where)
    assert made.recipe["train"] == {"per_device_train_batch_size": 16, "max_steps": 37}
    assert "max_steps: 37" in made.text
    assert "# one pass through about 600 rows" in made.text
    assert "a stream of 3 files train, 9 validation rows" in made.text
    write(made, tmp_path / "recipe.yaml")
    assert validate(tmp_path / "recipe.yaml").exit_code == 0
    results = Recipe.read(tmp_path / "recipe.yaml", {"train.max_steps": 3}).run(lambda line: None)
    assert results["rows"]["train"] is None
    assert draft([f"{tmp_path}/rows/*.jsonl"], model=base).recipe["output"] == "out/rows"  # read whole, without it


def test_the_commands_take_a_pattern_and_a_stream(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shards(tmp_path / "rows")
    runner = CliRunner()
    drafted = runner.invoke(app, ["init", "--streaming", "--data", "rows/*.jsonl", "--model", base])
    assert drafted.exit_code == 0, drafted.output
    recipe = Recipe.read("recipe.yaml")
    assert (recipe.streaming, recipe.data, recipe.output) == (True, "rows/*.jsonl", "out/rows")
    looked = runner.invoke(app, ["validate", "recipe.yaml"])
    assert looked.exit_code == 0, looked.output
    assert "rows      a stream of 3 files train" in looked.output
    assert "its first 125 rows were looked at" in looked.output
    planned = runner.invoke(app, ["train", "recipe.yaml", "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert hardware.STREAM in planned.output
    spoilt(tmp_path / "rows" / "part2.jsonl", 30, b"{broken\n")
    looked = runner.invoke(app, ["validate", "recipe.yaml"])
    assert looked.exit_code == 3
    assert "broken JSON (rows/part2.jsonl, line 31)" in looked.output


# ---------------------------------------------------------------------- many processes


def rows_read(folder: str, files: list[str]) -> list[str]:
    """In each process: the texts that it is dealt of an epoch."""
    from test_many_streams import plain, texts

    from adapters import lanes
    from adapters.contracts import Draw

    ranks.join()
    stream, _ = streaming.opened(files, print)
    made = lanes.Flow(stream, plain, Draw(1, 0), 10)
    made.deal(2)
    batches, found = iter(made.loader(4, texts, 2)), []
    while (step := made.step(batches, 1))[0]:
        found += [text for batch, blank in zip(*step, strict=True) if not blank for text in batch["texts"]]
    return found


def test_shards_are_dealt_to_processes(many: Callable[..., list[Ended]], tmp_path: Path) -> None:
    files = shards(tmp_path, "csv", sizes=(40, 25, 60, 3, 31))
    ended = many("test_streaming:rows_read", 2, tmp_path, list(map(str, files)))
    assert all(len(one.gave) > 20 for one in ended)
    found = [text for one in ended for text in one.gave]
    assert sorted(found) == sorted(row["text"] for row in tiny.rows(159))


def test_two_processes_stop_and_go_on_where_they_were(many: Callable[..., list[Ended]], tmp_path: Path) -> None:
    model = quiet_model(tmp_path / "model")
    shards(tmp_path / "rows", sizes=(30, 9, 2))  # 41 rows: the epochs end within the run
    write_rows(tmp_path / "held.csv", tiny.rows(10, seed=3))
    parts = {"train": str(tmp_path / "rows" / "*.jsonl"), "validation": str(tmp_path / "held.csv")}
    train = STEPS | {"max_steps": 12, "early_stopping_patience": 99, "logging_steps": 1}
    file = written(streamed(model, tmp_path, parts, train=train), tmp_path)
    asked = ["adapters", "train", file, "--output"]
    whole = many("test_streaming:program", 2, tmp_path, *asked, "whole")
    assert whole[0].err.count("a stream of 3 files train, 10 validation") == 1
    assert whole[1].err == whole[1].out == ""
    ended = many("test_streaming:interrupted", 2, tmp_path, 8, *asked, "cut", fails=True)
    assert [one.code for one in ended] == [143, 143]
    assert [place.name for place in (tmp_path / ".cut.run").glob("checkpoint-8")] == ["checkpoint-8"]
    many("test_streaming:program", 2, tmp_path, *asked, "cut", "--resume")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    losses = [
        [event["loss"] for event in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
         if event["event"] == "step"]
        for name in ("whole", "cut")
    ]  # fmt: skip
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12
