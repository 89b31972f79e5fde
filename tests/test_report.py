"""The report of a run: every task has its picture, nothing is loaded or run, and what rows say stays text."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import cells
import numpy as np
import pytest
import tiny
import yaml
from datasets import Dataset

import adapters
from adapters import card, census, charts, dossier, findings, journal, report
from adapters.adapt import task_class
from adapters.data import one
from adapters.errors import FolderError
from adapters.predict import Measured, measure
from adapters.tasks import TASKS

KINDS = {"causal-lm": "llama", "seq2seq": "t5", "denoising": "bart", "image-classification": "vit"}
HOSTILE = (
    "</script><script>alert(1)</script>\" onload='x' {{ 7 * 7 }} {% raw %} "
    "<img src=http://evil.example/x.png> &amp; \u2028"
)
PROBLEMS = {
    "multi-label": {"labels": list(tiny.LABELS), "problem": "multi-label"},
    "regression": {"problem": "regression"},
}


@cache
def adapted(task: str, problem: str = "") -> Any:
    kind = KINDS.get(task, "bert")
    options = PROBLEMS.get(problem) or cells.TASK_OPTIONS.get(task, {})
    net = tiny.model(kind, auto=task_class(task).auto_class, labels=2 if task == "question-answering" else 3)
    if problem == "regression":
        net = tiny.model(kind, labels=1)
    made = task_class(task)(**options)
    return adapters.adapt(net, "bitfit" if kind == "vit" else "lora", task=made, processor=tiny.processor(kind))


def raw_of(task: str, problem: str = "", n: int = 24) -> list[dict[str, Any]]:
    rows = cells.rows(task, n)
    if problem == "multi-label":
        return [{**row, "label": [row["label"], "c"] if row["label"] != "c" else ["c"]} for row in rows]
    if problem == "regression":
        return [{**row, "label": float(n) / 7} for n, row in enumerate(rows)]
    return rows


def evaluated(task: str, problem: str = "") -> tuple[Any, Measured, Dataset]:
    model, raw = adapted(task, problem), one(raw_of(task, problem))
    return model, measure(model, raw), raw


class Page(html.parser.HTMLParser):
    """What a browser would see of a page: its tags in their places, and its text."""

    VOID = ("meta", "img", "br", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(folder: Path) -> Page:
    text = (folder / report.FILE).read_text(encoding="utf-8")
    page = Page(text)
    assert [s.get("type") for s in page.all("script")] == ["application/json"]  # nothing that runs
    assert "default-src 'none'" in str(page.all("meta"))
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "a", "video", "use")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("href", "srcset", "action", "xlink:href")
            assert name != "src" or str(value).startswith("data:image/"), value
    for image in page.all("img"):
        assert image.get("alt")
    for picture in page.all("svg"):
        assert picture.get("role") == "img"
        assert picture.get("aria-label")
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    outside = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.DOTALL)
    assert not re.search(
        r'="[^"]*\b(nan|NaN|inf|Infinity|None|undefined)\b[^"]*"', re.sub(r'aria-label="[^"]*"', "", outside)
    )
    return page


# ---------------------------------------------------------------------- every task has its picture

CASES = [(task, "") for task in TASKS] + [("text-classification", "multi-label"), ("text-classification", "regression")]
WANTED = {
    "text-classification": {"confusion", "scores", "calibration", "errors"},
    "text-classification multi-label": {"scores", "calibration", "errors"},
    "text-classification regression": {"scatter", "errors"},
    "image-classification": {"confusion", "scores", "calibration", "errors"},
    "next-sentence": {"confusion", "scores", "calibration", "errors"},
    "token-classification": {"confusion", "scores", "calibration", "errors"},
    "question-answering": {"bars", "calibration", "errors"},
    "causal-lm": {"spread", "errors", "samples"},
    "masked-lm": {"spread", "errors", "samples"},
    "seq2seq": {"spread", "errors", "samples"},
    "denoising": {"spread", "errors", "samples"},
}
HEADINGS = {
    "confusion": "What was taken for what",
    "scores": "Scores by",
    "calibration": "Calibration",
    "scatter": "Predicted beside right",
    "bars": "Where answers are right",
    "spread": "How the loss is spread",
    "samples": "Sample answers",
}


@pytest.mark.parametrize(("task", "problem"), CASES, ids=lambda part: part or "own")
def test_every_task_has_its_picture(task: str, problem: str, tmp_path: Path) -> None:
    model, measured, raw = evaluated(task, problem)
    found = report.findings(model, measured, raw)
    wanted = WANTED[f"{task} {problem}".strip()]
    assert {name for name in found if found[name]} == {*wanted, "rows"}
    assert set(found) <= {"rows", *report.SHOWN}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["errors"]["shown"]
    model.record.metrics = {"test": measured.numbers}
    folder = adapters.save(model, tmp_path / "out")
    report.write(folder, found)
    page = page_of(folder)
    for name in wanted - {"errors"}:
        assert HEADINGS[name] in page.text
    assert report.kept(folder) == found
    assert "3 of 3 blocks" in page.text  # by the names in memory, which are not always those of the files
    if task == "image-classification":
        assert len(page.all("img")) == len(found["errors"]["shown"])
    assert (
        adapters.load(folder, tiny.model("bert", labels=3)) if task == "text-classification" and not problem else True
    )


def test_prepared_rows_have_their_picture_too() -> None:
    for task, problem in CASES:
        model, raw = adapted(task, problem), one(raw_of(task, problem))
        rows = model.task.prepare(raw, model.processor, model.model, labelled=True)[0]
        found = report.findings(model, measure(model, rows), None)
        assert found["errors"]["shown"], task
        assert "samples" not in found


def test_a_task_that_shows_nothing_has_a_report(tmp_path: Path) -> None:
    model, measured, raw = evaluated("text-classification")
    bare = type("Bare", (), {"metrics": None})()
    found = report.findings(model, dataclasses.replace(measured, task=bare), raw)
    assert found == {"rows": 24}
    model.record.metrics = {"test": measured.numbers}
    folder = adapters.save(model, tmp_path / "out")
    report.write(folder, found)
    assert "What trained" in page_of(folder).text


# ---------------------------------------------------------------------- what is shown is right


def test_a_matrix_and_its_scores_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import confusion_matrix, f1_score

    draw = np.random.default_rng(0)
    truth, said = draw.integers(0, 5, 200), draw.integers(0, 4, 200)
    names = [f"n{n}" for n in range(6)]
    plain = confusion_matrix(truth, said, labels=range(6))
    cells_of = findings.confusion(said.tolist(), truth.tolist(), names)["cells"]
    assert {(a, b): n for a, b, n in cells_of} == {(a, b): plain[a, b] for a, b in zip(*plain.nonzero(), strict=True)}
    scores = {row["label"]: row["f1"] for row in findings.per_label(said, truth, names)}
    assert list(scores) == names[:5]  # the sixth occurs nowhere
    assert list(scores.values()) == pytest.approx(f1_score(truth, said, labels=range(5), average=None, zero_division=0))


def test_calibration_is_the_weighted_gap_of_ten_bins() -> None:
    sure = np.array([0.95, 0.95, 0.55, 1.0])
    right = np.array([True, False, True, True])
    found = findings.calibration(sure, right, "answers")
    assert [(b["bin"], b["rows"]) for b in found["bins"]] == [(5, 1), (9, 3)]
    assert found["ece"] == pytest.approx(0.25 * 0.45 + 0.75 * abs(2.9 / 3 - 2 / 3))


def test_the_surest_errors_come_first_and_right_rows_not_at_all() -> None:
    model, measured, raw = evaluated("text-classification")
    logits = np.full((24, 3), -5.0)
    truth = np.asarray(measured.rows["labels"])
    logits[np.arange(24), truth] = 5.0
    logits[7], logits[9] = (9.0, -9.0, -9.0), (1.0, 0.0, 0.0)
    truth[7], truth[9] = 1, 2
    rows = measured.rows.remove_columns("labels").add_column("labels", truth.tolist())
    found = report.findings(model, dataclasses.replace(measured, found=(logits,), rows=rows), raw)
    assert [one["row"] for one in found["errors"]["shown"]] == [7, 9]
    assert found["errors"]["count"] == 2
    first = found["errors"]["shown"][0]
    assert (first["text"], first["expected"], first["said"]) == (raw[7]["text"], "b", "a")


def test_entities_are_scored_as_the_metrics_score_them() -> None:
    model, measured, raw = evaluated("token-classification")
    found = report.findings(model, measured, raw)
    counted = sum(row["rows"] for row in found["scores"])
    hits = sum(row["recall"] * row["rows"] for row in found["scores"])
    assert hits / counted == pytest.approx(measured.numbers["recall"])
    sentence = found["errors"]["shown"][0]
    assert [word for word, *_ in sentence["words"]] == raw[sentence["row"]]["tokens"]
    assert any(right != said for _, right, said in sentence["words"])


def test_the_groups_of_answers_are_all_the_answers() -> None:
    model, measured, raw = evaluated("question-answering")
    for group in report.findings(model, measured, raw)["bars"]:
        rows = sum(bar["rows"] for bar in group["bars"])
        assert rows == len(raw)
        assert sum(bar["value"] * bar["rows"] for bar in group["bars"]) / rows == pytest.approx(measured.numbers["f1"])


# ---------------------------------------------------------------------- hostile words


def test_what_rows_and_labels_say_stays_text(tmp_path: Path) -> None:
    labels = (HOSTILE, "b" * 300, "c")
    rows = [{"text": f"{HOSTILE} {n}", "label": labels[n % 3]} for n in range(12)]
    net = tiny.model("bert")
    model = adapters.adapt(net, "lora", task="text-classification", labels=labels, processor=tiny.tokenizer())
    measured = measure(model, one(rows))
    model.record.metrics = {"test": measured.numbers}
    model.record.notes.append(HOSTILE)
    model.record.recipe = {"model": HOSTILE}
    folder = adapters.save(model, tmp_path / "out <b>")
    events = journal.Journal(folder / journal.FILE)
    events.begin(task=HOSTILE)
    events.write("machine", processor=HOSTILE)
    events.write("data", parts={HOSTILE: 3}, labels={HOSTILE: {HOSTILE: 3}}, lengths=None)
    events.write("phase", name=HOSTILE, took=1)
    report.write(folder, report.findings(model, measured, one(rows)))
    page = page_of(folder)
    assert "</script><script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert " 49 " not in page.text
    assert report.kept(folder)["errors"]["shown"][0]["text"].startswith("</script>")
    report.write(folder)  # again, from what the page holds
    assert page_of(folder).text == page.text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>not ours</html>",
        b'<script type="application/json" id="findings">[1]</script>',
        b'<script type="application/json" id="findings">{"a": NaN}</script>',
        b'<script type="application/json" id="findings">{"rows": 1, "errors": 3}</script>',
        b'<script type="application/json" id="findings">{"rows": 1, "calibration": {"bins": [{}]}}</script>',
        b'<script type="application/json" id="findings">{"rows": 1, "confusion": {"cells": [[9, 9, 1]], "labels": []}}'
        b"</script>",
    ],
)
def test_a_page_that_is_none_of_ours_is_refused(content: bytes, saved: Path) -> None:
    (saved / report.FILE).write_bytes(content)
    with pytest.raises(FolderError, match=r"report.html|form"):
        report.write(saved)
    assert (saved / report.FILE).read_bytes() == content


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, measured, _ = evaluated("text-classification")
    model.record.metrics = {"test": measured.numbers}
    return adapters.save(model, tmp_path / "saved")


@pytest.mark.parametrize(
    "events",
    [
        [{"event": "step", "step": "a", "loss": [1]}, {"event": "evaluation", "part": "validation", "numbers": {}}],
        [{"event": "step", "step": 1, "loss": None}, {"event": "step", "step": 2, "loss": 0.0}],
        [
            {"event": "step", "step": 1, "loss": 1e300, "learning_rate": 0.0},
            {"event": "step", "step": 2, "loss": -1e300},
        ],
        [{"event": "phase"}, {"event": "phase", "name": 3, "took": "long"}, {"event": "machine"}, {"event": "data"}],
    ],
)
def test_a_journal_with_holes_makes_a_report(events: list[dict[str, Any]], saved: Path) -> None:
    (saved / journal.FILE).write_text("".join(json.dumps(event) + "\n" for event in events))
    report.write(saved, {})
    page_of(saved)


# ---------------------------------------------------------------------- a run's own


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str], int]:
    folder = tmp_path_factory.mktemp("run")
    base = tiny.folder("bert", folder / "bert")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(60)))
    train = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 5e-3}
    plan = adapters.Recipe(model=base, data=str(folder / "rows.jsonl"), output=str(folder / "out"), train=train)
    said: list[str] = []
    kind, counted = TASKS["text-classification"], []
    plain = kind.prepare

    def counting(self: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        counted.append(len(rows))
        return plain(self, rows, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "prepare", counting)
        results = plan.run(said.append)
    return folder / "out", results, said, counted.count(6)


def test_a_run_leaves_its_report(run: tuple[Path, dict[str, Any], list[str], int]) -> None:
    out, results, _, _ = run
    assert results["report"] == str(out / report.FILE)
    page = page_of(out)
    text = page.text
    assert f"{results['test']['accuracy']:.3f}" in text
    for told in ("before training", "without a look at the input", "encoder.layer", "adapters train", "torch"):
        assert told in text
    for heading in ("Course of the run", "What trained", "Data", "Time and memory", "Environment", "Again"):
        assert heading in text
    for note in results["notes"]:
        assert note in text
    assert "48 rows" in text
    assert len([p for p in page.all("svg") if "by step" in str(p.get("aria-label"))]) == 3
    assert ("did not beat its baselines" in text) == ("It did not beat its baselines" in text)
    assert ("did not beat its baselines" in text) == (not results["beat_baseline"])
    assert (out / report.FILE).stat().st_size < 200_000
    adapters.load(out)  # the two files are no part of what digests cover


def test_the_test_rows_are_prepared_once(run: tuple[Path, dict[str, Any], list[str], int]) -> None:
    assert run[3] == 2  # validation and test have six rows each; three measurements of the test read one preparation


def test_the_report_is_made_again_with_and_without_rows(
    run: tuple[Path, dict[str, Any], list[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    from adapters.commands.report import report as command

    out, _, _, _ = run
    before = page_of(out).text
    command(str(out))
    assert capsys.readouterr().out == f"report    {out / report.FILE}\n"
    assert page_of(out).text == before
    command(str(out), data=str(out.parent / "rows.jsonl"), as_json=True)
    assert json.loads(capsys.readouterr().out) == {"report": str(out / report.FILE)}
    assert "60 rows of rows.jsonl" in page_of(out).text
    texts = [row["text"] for row in tiny.rows(60)]
    command(str(out), data=str(out.parent / "rows.jsonl"), rows=False)
    content = (out / report.FILE).read_text()
    assert not any(text in content for text in texts)
    assert "Scores by label" in page_of(out).text


def test_a_report_that_fails_is_said_and_costs_no_run(
    run: tuple[Path, dict[str, Any], list[str], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, _, _ = run

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a broken report")

    monkeypatch.setattr(report, "html", broken)
    monkeypatch.setattr(report, "findings", broken)
    said: list[str] = []
    plan = adapters.Recipe.read(out / "run.yaml", {"output": str(tmp_path / "again"), "strategy": "probe"})
    results = plan.run(said.append)
    assert results["report"] is None
    assert len([line for line in said if "a broken report" in line and "adapters report" in line]) == 2
    assert (tmp_path / "again" / journal.FILE).is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == ["again"]
    adapters.load(tmp_path / "again")


def test_the_card_says_what_is_known(run: tuple[Path, dict[str, Any], list[str], int]) -> None:
    out, results, _, _ = run
    text = (out / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "holdfast"
    for section in ("Use", "Data", "Results", "Limits", "Training"):
        assert f"\n## {section}\n" in text
    assert f"| accuracy | {results['test']['accuracy']:.4g} | {results['untrained']['accuracy']:.4g} |" in text
    assert "48 training rows from rows.jsonl" in text
    assert "its 3 labels and no others" in text
    assert "cores" in text
    assert "More Information Needed" not in text
    assert str(out.parent) not in text.split("## Training")[0]


def test_the_card_of_an_untrained_adapter_claims_nothing() -> None:
    model = adapters.adapt(tiny.model("bert"), "lora", labels=tiny.LABELS, processor=tiny.tokenizer())
    document = {"backbone": {"fingerprint": {"digest": "d", "tensors": {}}}, "tensors": {}, "versions": {}}
    text = card.card(model, {**document, "holdfast": "0"})
    assert "not measured on test rows" in text
    assert "has not been trained" in text
    assert "unmeasured" in text


# ---------------------------------------------------------------------- numbers to places


@pytest.mark.parametrize("greater", [True, False])
@pytest.mark.parametrize("better", [True, False, None])
def test_the_headline_says_whether_the_baselines_were_beaten(greater: bool, better: bool | None) -> None:
    ours = {True: 0.9 if greater else 0.1, False: 0.5, None: 0.5}[better]
    metrics = {"test": {"m": ours}} | ({"majority": {"m": 0.5}, "untrained": {"m": 0.3}} if better is not None else {})
    if not greater and better is not None:
        metrics["untrained"] = {"m": 0.8}
    head = dossier.headline(metrics, "m", greater)
    assert head["beaten"] is better
    assert all(0 <= bar["share"] <= 100 for bar in head["bars"])


def test_a_run_that_was_not_measured_says_so() -> None:
    assert dossier.headline({}, "m", True)["value"] is None
    assert dossier.headline({"validation": {"m": 0.25}}, "m", True)["part"] == "validation"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 7), (-3, 12), (1e-9, 3e-9), (0, 12345), (99.9, 100.1)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in found)
    assert len({charts.short(tick, 6) for tick in found}) == len(found)


@pytest.mark.parametrize(
    "points",
    [[(1, 0.0)], [(1, 5.0), (2, 5.0)], [(0, 1e-8), (9, 1e8)], [(1, -1.0), (1, 1.0)], [(n, n**3) for n in range(99)]],
)
def test_lines_stay_inside_their_picture(points: list[tuple[float, float]]) -> None:
    chart = charts.lines([{"name": "n", "look": "one", "points": points, "dots": True}], x="x", y="y")
    assert chart is not None
    for x, y, _ in chart["series"][0]["dots"]:
        assert charts.LEFT - 0.1 <= x <= charts.WIDTH - charts.RIGHT + 0.1
        assert charts.TOP - 0.1 <= y <= charts.HEIGHT - charts.BOTTOM + 0.1


def test_rows_are_counted_by_part_and_label() -> None:
    parts = {"train": one([{"text": "x", "label": "a|b"}, {"text": "y", "label": "b"}])}
    prepared = Dataset.from_dict({"length": list(range(2, 30)), "labels": [0.0] * 28})
    found = census.census(parts, prepared, "multi-label")
    assert found["labels"] == {"train": {"a": 1, "b": 2}}
    assert sum(found["lengths"]["counts"]) == 28
    assert census.census(parts, prepared, "regression")["labels"] == {}


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: dossier.size(999), "999 bytes"),
        (lambda: dossier.size(1_440_000), "1.44 MB"),
        (lambda: dossier.duration(0.0123), "0.012 s"),
        (lambda: dossier.duration(3725), "1 h 02 min"),
        (lambda: findings.cut("a  b\n" * 400, 20), "a b a b a b a b a b…"),
        (lambda: findings.around("x" * 50 + "here" + "y" * 50, 50, 54, 10), "…xxxhereyyy…"),
    ],
)
def test_words_for_numbers_and_parts_of_texts(make: Callable[[], str], wanted: str) -> None:
    assert make() == wanted
