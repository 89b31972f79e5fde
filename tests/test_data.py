"""Rows are read as they are written, split without leaks, and identified by every value in order."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import data, division, identity, labels
from adapters.errors import DataError, RequestError

ROWS = [
    {"text": "where is my parcel", "label": "a"},
    {"text": 'a "quoted", comma', "label": "b"},
    {"text": "two\nlines", "label": "a"},
    {"text": "żółć ☕ 07", "label": "007"},
]
KNOWN = {"text": "the text", "text_pair": "the second", "label": "the label"}
QUICK = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def table(rows: list[dict[str, Any]], separator: str) -> str:
    quoted = [[f'"{str(value).replace(chr(34), chr(34) * 2)}"' for value in row.values()] for row in rows]
    return "\n".join(separator.join(line) for line in [list(rows[0]), *quoted]) + "\n"


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(table(rows, ","), encoding="utf-8")


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(table(rows, "\t"), encoding="utf-8")


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    Dataset.from_list(rows).to_parquet(path)


def zipped(write: Callable[[Path, list[dict[str, Any]]], None]) -> Callable[[Path, list[dict[str, Any]]], None]:
    def write_zipped(path: Path, rows: list[dict[str, Any]]) -> None:
        plain = path.with_name(path.name.removesuffix(".gz"))
        write(plain, rows)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()

    return write_zipped


WRITERS = {
    "csv": write_csv,
    "tsv": write_tsv,
    "json": write_json,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "csv.gz": zipped(write_csv),
    "tsv.gz": zipped(write_tsv),
    "json.gz": zipped(write_json),
    "jsonl.gz": zipped(write_jsonl),
}


def made(labels: list[str], texts: list[str] | None = None) -> Dataset:
    return Dataset.from_dict({"text": texts or [f"text {index}" for index in range(len(labels))], "label": labels})


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("form", [str, Path])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str, form: type[Any]) -> None:
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, ROWS)
    splits = data.read(form(path))
    assert list(splits) == ["train"]
    assert splits["train"].to_list() == ROWS


@pytest.mark.parametrize(
    "source",
    [
        ROWS,
        tuple(ROWS),
        Dataset.from_list(ROWS),
        {"train": ROWS},
        {"train": Dataset.from_list(ROWS)},
        DatasetDict({"train": Dataset.from_list(ROWS)}),
    ],
    ids=["list", "tuple", "Dataset", "mapping", "mapping of Datasets", "DatasetDict"],
)
def test_every_python_source_gives_the_same_rows(source: Any) -> None:
    splits = data.read(source)
    assert list(splits) == ["train"]
    assert splits["train"].to_list() == ROWS


def test_a_mapping_may_name_files_and_splits_by_any_usual_name(tmp_path: Path) -> None:
    for part in ("one", "two", "three"):
        write_jsonl(tmp_path / f"{part}.jsonl", [{"text": part, "label": "a"}])
    splits = data.read({"train": str(tmp_path / "one.jsonl"), "dev": tmp_path / "two.jsonl", "test": [{"text": "x"}]})
    assert {name: rows["text"][0] for name, rows in splits.items()} == {
        "train": "one",
        "validation": "two",
        "test": "x",
    }


@pytest.mark.parametrize("name", ["validation.csv", "valid.csv", "val.csv", "dev.csv", "my_dev.csv"])
def test_a_folder_is_read_by_the_names_of_its_files(tmp_path: Path, name: str) -> None:
    write_csv(tmp_path / "train.csv", ROWS)
    write_jsonl(tmp_path / "test.jsonl", ROWS[:1])
    write_csv(tmp_path / name, ROWS[:2])
    (tmp_path / "README.md").write_text("not rows")
    splits = data.read(tmp_path)
    assert {part: len(rows) for part, rows in splits.items()} == {"train": 4, "validation": 2, "test": 1}


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_words_that_others_take_for_missing_stay_words(tmp_path: Path, kind: str) -> None:
    words = ["NA", "null", "None", "nan", "N/A", "#N/A", "NULL", "-inf", "true", "1e5", "007", "2020-01-01"]
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, [{"text": word, "label": word} for word in words])
    rows = data.read(path)["train"]
    assert list(rows["text"]) == words
    assert list(rows["label"]) == words


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("\ufefftext,label\nhello,a\n".encode())
    assert data.read(path)["train"].to_list() == [{"text": "hello", "label": "a"}]


def test_windows_line_ends_are_no_part_of_the_values(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"text,label\r\nhello,a\r\nyou,b\r\n")
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "hello", "label": "a"}\r\n\r\n{"text": "you", "label": "b"}\r\n')
    wanted = [{"text": "hello", "label": "a"}, {"text": "you", "label": "b"}]
    assert data.read(tmp_path / "rows.csv")["train"].to_list() == wanted
    assert data.read(tmp_path / "rows.jsonl")["train"].to_list() == wanted


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_a_line_of_json_ends_at_a_newline_and_nowhere_else(tmp_path: Path, mark: str) -> None:
    rows = [{"text": f"before{mark}after", "label": "a"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert data.read(tmp_path / "rows.jsonl")["train"].to_list() == rows


def test_whole_numbers_and_fractions_may_share_a_column() -> None:
    rows = data.read([{"text": "a", "label": 1}, {"text": "b", "label": 2.5}])["train"]
    assert list(rows["label"]) == [1.0, 2.5]


# ---------------------------------------------------------------------- plain text, tagged sentences


def said(source: Any) -> tuple[Dataset, list[str]]:
    lines: list[str] = []
    return data.one(source, lines.append), lines


@pytest.mark.parametrize("packed", [False, True])
def test_plain_text_is_a_row_a_paragraph(tmp_path: Path, packed: bool) -> None:
    content = "\ufeff\n\nFirst line\r\nsecond line\r\n \r\n\r\nNA\n\n\n  indented\n".encode()
    path = tmp_path / ("text.txt.gz" if packed else "text.txt")
    path.write_bytes(gzip.compress(content) if packed else content)
    rows, lines = said(path)
    assert rows.to_list() == [{"text": "First line\nsecond line"}, {"text": "NA"}, {"text": "indented"}]
    assert lines == [f"{path}: one row a paragraph, blank lines divide them: 3 rows"]


def test_plain_text_without_blank_lines_is_a_row_a_line(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "test.txt").write_text("four\n\nfive\n")
    rows, lines = said(tmp_path / "train.txt")
    assert list(rows["text"]) == ["one", "two", "three"]
    assert "no blank lines, so one row a line: 3 rows" in lines[0]
    assert {part: len(rows) for part, rows in data.read(tmp_path).items()} == {"train": 3, "test": 2}


CONLL = "\n".join(
    [
        "-DOCSTART- -X- -X- O",
        "",
        "# id 7",
        "Ada NNP B-NP B-PER",
        "writes VBZ B-VP O",
        "",
        "",
        "# CD B-NP O",
        "NA NNP I-NP O",
    ]
)


@pytest.mark.parametrize("suffix", ["conll", "iob", "bio", "conll.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tagged_sentences_are_tokens_and_tags(tmp_path: Path, suffix: str, end: str) -> None:
    content = CONLL.replace("\n", end).encode()
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    rows, lines = said(path)
    assert rows.to_list() == [
        {"tokens": ["Ada", "writes"], "tags": ["B-PER", "O"]},
        {"tokens": ["#", "NA"], "tags": ["O", "O"]},
    ]
    assert lines == [f"{path}: 2 sentences, 2 different tags; tokens from the first of 4 columns, tags from the last"]


def test_where_tabs_divide_a_token_may_hold_spaces(tmp_path: Path) -> None:
    (tmp_path / "rows.bio").write_text("New York\tB-LOC\nsleeps\tO\n")
    assert data.one(tmp_path / "rows.bio").to_list() == [{"tokens": ["New York", "sleeps"], "tags": ["B-LOC", "O"]}]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("Ada B-PER\nwrites\nwell O\n", r"rows\.conll, line 2\); expected 2 columns.*found 'writes'"),
        ("Ada\nwrites\n", r"rows\.conll, line 1\); expected 2 columns"),
        ("Ada\tB-PER\nwrites\t\n", r"rows\.conll, line 2"),
        ("-DOCSTART- O\n\n", "0 sentences"),
        ("\n\n", "0 sentences"),
    ],
)
def test_a_line_that_is_no_token_with_its_tag_is_named(tmp_path: Path, content: str, match: str) -> None:
    (tmp_path / "rows.conll").write_text(content)
    with pytest.raises(DataError, match=match):
        data.read(tmp_path / "rows.conll")


# ---------------------------------------------------------------------- traps of loaders

TRAPS: dict[str, tuple[str, bytes, str]] = {
    "latin-1 deep in a table": (
        "rows.csv",
        b"text,label\n" + b"hello,a\n" * 5000 + b"caf\xe9,b\n" + b"you,a\n" * 5000,
        r"rows\.csv, line 5002, byte 4\); expected utf-8 text; found the byte 0xe9",
    ),
    "latin-1 in text": ("rows.txt", b"one\n\ncaf\xe9\n", r"rows\.txt, line 3, byte 4"),
    "utf-16": ("rows.csv", "text,label\nhello,a\n".encode("utf-16"), r"line 1, byte 1.*Save the file as utf-8"),
    "a key twice": (
        "rows.jsonl",
        b'{"text": "a", "label": "x"}\n{"text": "b", "label": "x", "label": "y"}\n',
        r"line 2\); found the key 'label' stands twice",
    ),
    "NaN on a line": (
        "rows.jsonl",
        b'{"text": "a", "label": 1.5}\n{"text": "b", "label": NaN}\n',
        r"rows\.jsonl, row 1, column 'label'\).*found NaN",
    ),
    "Infinity in a list": (
        "rows.json",
        b'[{"text": "a", "label": [1.0]}, {"text": "b", "label": [-Infinity]}]',
        r"rows\.json, row 1, column 'label'\).*found -Infinity",
    ),
    "rows under a key": (
        "rows.json",
        b'{"version": 1, "data": [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]}',
        r"one record that holds the rows \(.*rows\.json, column 'data'\).*list under 'data'",
    ),
    "rows under a key, over several lines": (
        "rows.json",
        b'{\n "reviews": [\n  {"text": "a", "label": "x"}\n ]\n}\n',
        r"one record that holds the rows \(.*column 'reviews'\)",
    ),
    "a header alone": ("rows.csv", b"text,label\n", r"rows\.csv\); found a header and 0 rows"),
    "nothing": ("rows.txt", b"", r"rows\.txt\); found 0 bytes"),
    "blank lines alone": ("rows.txt", b"\n \n", r"rows\.txt\); found no text"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_named_with_file_row_and_column(name: str, tmp_path: Path) -> None:
    file, content, match = TRAPS[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=match) as caught:
        data.read(tmp_path / file)
    assert "\n" not in str(caught.value)


def test_one_row_that_is_a_conversation_is_no_wrapper(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert data.one(tmp_path / "rows.jsonl").to_list() == [row]


def test_a_byte_order_mark_is_no_part_of_json(tmp_path: Path) -> None:
    for kind in ("json", "jsonl"):
        (tmp_path / f"rows.{kind}").write_bytes("\ufeff".encode() + json.dumps([{"text": "a"}]).encode())
        assert data.one(tmp_path / f"rows.{kind}").to_list() == [{"text": "a"}]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_an_edit_is_seen_though_size_and_time_stay(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, [{"text": "AA", "label": "x"}])
    before = path.stat()
    assert data.one(path)["text"][0] == "AA"
    WRITERS[kind](path, [{"text": "BB", "label": "x"}])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert data.one(path)["text"][0] == "BB"


def test_a_parquet_file_keeps_its_class_names_and_a_column_that_is_no_text_is_named(tmp_path: Path) -> None:
    features = Features({"text": Value("int64"), "label": ClassLabel(names=["x", "y"])})
    Dataset.from_dict({"text": [7], "label": [1]}, features=features).to_parquet(tmp_path / "rows.parquet")
    rows = data.one(tmp_path / "rows.parquet")
    assert rows.features["label"].names == ["x", "y"]
    with pytest.raises(DataError, match=r"not text \(row 0, column 'text'\).*found 7"):
        data.texts_in(rows["text"], "text")


def test_labels_that_are_numbers_and_words_are_refused_where_they_are_read_off_the_rows(tmp_path: Path) -> None:
    from adapters.tasks.text_classification import TextClassification

    (tmp_path / "rows.csv").write_text("text,label\na,1\nb,neg\nc,2\n")
    rows = data.one(tmp_path / "rows.csv")
    match = r"'neg' among numbers \(row 1, column 'label'\).*found 1, 2 and neg.*labels="
    with pytest.raises(DataError, match=match):
        TextClassification().with_rows(rows)
    TextClassification(labels=("1", "2", "neg")).check(rows, labelled=True)
    labels.one_kind({"1": 0, "-2.5": 1})
    labels.one_kind({"007 films": 0, "3M": 1})


# ---------------------------------------------------------------------- sets of the hub


def from_hub(monkeypatch: pytest.MonkeyPatch, **parts: Any) -> tuple[dict[str, Dataset], list[str]]:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda name: DatasetDict(parts))
    lines: list[str] = []
    return data.read("some/set", lines.append), lines


def test_splits_of_the_hub_that_are_not_known_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = made(["a", "b"])
    splits, lines = from_hub(monkeypatch, train=rows, dev=rows, unsupervised=rows)
    assert list(splits) == ["train", "validation"]
    assert len(lines) == 1
    assert "some/set: left out the split 'unsupervised'" in lines[0]
    with pytest.raises(DataError, match=r"no split to train on \(some/set\).*found unsupervised, test"):
        from_hub(monkeypatch, unsupervised=rows, test=rows)


def test_splits_of_the_hub_without_labels_are_left_out_and_no_training_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapters.tasks.text_classification import TextClassification

    features = Features({"text": Value("string"), "label": ClassLabel(names=["x", "y"])})
    given, hidden = (
        Dataset.from_dict({"text": ["a", "b"], "label": numbers}, features=features) for numbers in ([0, 1], [-1, -1])
    )
    splits, lines = from_hub(monkeypatch, train=given, test=hidden)
    assert list(splits) == ["train"]
    assert "left out the split 'test', whose column 'label' holds no labels" in lines[0]
    splits, _ = from_hub(monkeypatch, train=hidden, test=given)
    with pytest.raises(DataError, match=r"label is missing \(row 0, column 'label'\)"):
        TextClassification(labels=("x", "y")).check(splits["train"], labelled=True)


def test_what_is_chosen_is_logged_where_nobody_listens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "rows.txt").write_text("one\n\ntwo\n")
    with caplog.at_level("INFO", logger="adapters.data"):
        data.read(tmp_path / "rows.txt")
    assert "one row a paragraph" in caplog.text


# ---------------------------------------------------------------------- renaming


def test_columns_rename_and_nothing_else_changes() -> None:
    rows = Dataset.from_list([{"review": "good", "stars": "5", "id": 1}])
    renamed = data.rename(rows, {"text": "review", "label": "stars"}, KNOWN)
    assert renamed.to_list() == [{"text": "good", "label": "5", "id": 1}]


def test_a_renamed_column_takes_the_place_of_one_that_has_its_name() -> None:
    rows = Dataset.from_list([{"text": "old", "body": "new", "label": "a"}])
    assert data.rename(rows, {"text": "body"}, KNOWN).to_list() == [{"text": "new", "label": "a"}]


def test_two_columns_can_swap_names() -> None:
    rows = Dataset.from_list([{"text": "label", "label": "text"}])
    renamed = data.rename(rows, {"text": "label", "label": "text"}, KNOWN)
    assert renamed.to_list() == [{"text": "text", "label": "label"}]


@pytest.mark.parametrize("columns", [None, {}, {"text": "text"}])
def test_no_renaming_leaves_rows_alone(columns: dict[str, str] | None) -> None:
    rows = Dataset.from_list(ROWS)
    assert data.rename(rows, columns, KNOWN).to_list() == ROWS


def test_unknown_columns_are_named_on_either_side() -> None:
    rows = Dataset.from_list([{"review": "good"}])
    with pytest.raises(RequestError, match=r"no column 'txt'.*Did you mean 'text'"):
        data.rename(rows, {"txt": "review"}, KNOWN)
    with pytest.raises(DataError, match=r"no column 'reviw'.*Did you mean 'review'"):
        data.rename(rows, {"text": "reviw"}, KNOWN)


# ---------------------------------------------------------------------- splitting


@QUICK
@given(
    labels=st.lists(st.sampled_from("abcd"), min_size=30, max_size=80),
    copies=st.lists(st.integers(0, 79), max_size=20),
    shares=st.tuples(st.floats(0.05, 0.45), st.floats(0.05, 0.45)),
    seed=st.integers(0, 2**16),
)
def test_parts_are_disjoint_complete_and_share_no_text(
    labels: list[str], copies: list[int], shares: tuple[float, float], seed: int
) -> None:
    texts = [f"text {index}" for index in range(len(labels))]
    for copy in copies:
        texts[copy % len(texts)] = texts[0]
    rows = made(labels, texts).add_column("id", list(range(len(labels))))
    try:
        parts, _ = division.split(
            rows, {"validation": shares[0], "test": shares[1]}, seed=seed, by="label", text="text"
        )
    except DataError:  # too few rows of each class for a part: refused, nothing to look at
        return
    assert set(parts) == {"train", "validation", "test"}
    ids = [number for part in parts.values() for number in part["id"]]
    assert sorted(ids) == list(range(len(labels)))
    for one in parts:
        assert len(parts[one]) > 0
        for other in set(parts) - {one}:
            assert not set(parts[one]["text"]) & set(parts[other]["text"])


@QUICK
@given(counts=st.lists(st.integers(10, 60), min_size=1, max_size=4), seed=st.integers(0, 2**16))
def test_each_class_is_divided_in_proportion(counts: list[int], seed: int) -> None:
    labels = [str(label) for label, count in enumerate(counts) for _ in range(count)]
    parts, remarks = division.split(made(labels), {"validation": 0.1, "test": 0.2}, seed=seed, by="label", text="text")
    assert remarks == []
    for name, share in (("validation", 0.1), ("test", 0.2)):
        assert len(parts[name]) == round(share * len(labels))
        found = Counter(parts[name]["label"])
        for label, count in enumerate(counts):
            assert found[str(label)] in (math.floor(share * count + 1e-9), math.ceil(share * count - 1e-9))


@QUICK
@given(
    counts=st.lists(st.integers(1, 12), min_size=2, max_size=30),
    shares=st.tuples(st.floats(0.05, 0.45), st.floats(0.05, 0.45)),
    seed=st.integers(0, 2**16),
)
def test_small_classes_keep_a_row_in_train_and_the_missing_ones_are_named(
    counts: list[int], shares: tuple[float, float], seed: int
) -> None:
    labels = [f"class-{label}-" for label, count in enumerate(counts) for _ in range(count)]
    try:
        parts, remarks = division.split(
            made(labels), {"validation": shares[0], "test": shares[1]}, seed=seed, by="label", text="text"
        )
    except DataError:
        assert max(shares) * len(labels) < len(counts) + 1
        return
    assert set(parts["train"]["label"]) == set(labels)
    lacking = {name: set(labels) - set(part["label"]) for name, part in parts.items()}
    for name, classes in lacking.items():
        assert (f"{name} lacks {len(classes)} " in " ".join(remarks)) == bool(classes)
    assert len(remarks) == any(lacking.values())


def test_many_small_classes_give_every_part_its_share() -> None:
    rows = made([f"c{index % 50}" for index in range(200)])
    parts, remarks = division.split(rows, {"validation": 0.1, "test": 0.1}, seed=0, by="label", text="text")
    assert {name: len(part) for name, part in parts.items()} == {"validation": 20, "test": 20, "train": 160}
    for name in ("validation", "test"):
        assert max(Counter(parts[name]["label"]).values()) == 1
        assert f"{name} lacks 30 " in remarks[0]
    assert not set(parts["validation"]["label"]) & set(parts["test"]["label"])  # no class gives twice while others wait
    assert min(Counter(parts["train"]["label"]).values()) == 3
    again, _ = division.split(rows, {"validation": 0.1, "test": 0.1}, seed=1, by="label", text="text")
    assert set(again["test"]["label"]) != set(parts["test"]["label"])


def test_where_small_classes_leave_too_little_every_part_is_short_alike() -> None:
    rows = made([f"c{index % 40}" for index in range(80)])  # one of each two stays in train: 40 for both parts
    parts, _ = division.split(rows, {"validation": 0.4, "test": 0.4}, seed=0, by="label", text="text")
    assert {name: len(part) for name, part in parts.items()} == {"validation": 20, "test": 20, "train": 40}


def test_rows_in_two_given_parts_are_counted_and_the_first_is_named() -> None:
    train = made(["a", "b", "a"], ["one", "two", "three"])
    test = made(["a", "b", "b", "a"], ["new", "two", "two", "three"])
    assert division.shared({"train": train, "test": made(["a"], ["other"])}, ["text"]) == []
    assert division.shared({"train": made(["a", "a"], ["one", "one"])}, ["text"]) == []
    remarks = division.shared({"train": train, "validation": made(["a"], ["new"]), "test": test}, ["text"])
    assert len(remarks) == 2
    assert "1 of 4 test rows stand in validation too (first: test row 0, validation row 0)" in remarks[0]
    assert "3 of 4 test rows stand in train too (first: test row 1, train row 1)" in remarks[1]
    pairs = [
        rows.add_column("text_pair", [f"{part} {i}" for i in range(len(rows))])
        for part, rows in (("train", train), ("test", test))
    ]
    assert division.shared(dict(zip(("train", "test"), pairs, strict=True)), ["text", "text_pair"]) == []
    assert division.shared({"train": train, "test": test}, []) == []


def test_the_seed_alone_decides_who_goes_where() -> None:
    rows = made(["a", "b"] * 50)

    def ids(seed: int) -> dict[str, list[str]]:
        parts, _ = division.split(rows, {"validation": 0.2}, seed=seed, by="label", text="text")
        return {name: list(part["text"]) for name, part in parts.items()}

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_rows_keep_their_order_inside_a_part() -> None:
    rows = made(["a", "b"] * 30).add_column("id", list(range(60)))
    parts, _ = division.split(rows, {"validation": 0.3}, seed=0, by="label", text="text")
    for part in parts.values():
        assert list(part["id"]) == sorted(part["id"])


def test_classes_too_small_to_divide_stay_in_train_and_are_said() -> None:
    rows = made(["big"] * 50 + ["rare"] * 2 + ["once"])
    parts, remarks = division.split(rows, {"validation": 0.1, "test": 0.1}, seed=0, by="label", text="text")
    assert len(remarks) == 1
    assert "2 of 3 classes" in remarks[0]
    assert "rare" in remarks[0]
    assert "once" in remarks[0]
    assert Counter(parts["train"]["label"])["rare"] == 2
    assert Counter(parts["train"]["label"])["once"] == 1


def test_equal_texts_stay_together_even_where_their_labels_differ() -> None:
    rows = made(["a", "b"] * 40, [f"text {index // 2}" for index in range(80)])
    parts, _ = division.split(rows, {"validation": 0.25}, seed=3, by="label", text="text")
    assert not set(parts["train"]["text"]) & set(parts["validation"]["text"])
    assert len(parts["train"]) + len(parts["validation"]) == 80


def test_class_numbers_divide_like_names() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["x", "y"])})
    rows = Dataset.from_dict({"text": [str(i) for i in range(40)], "label": [0, 1] * 20}, features=features)
    parts, _ = division.split(rows, {"test": 0.2}, seed=0, by="label", text="text")
    assert Counter(parts["test"]["label"]) == {0: 4, 1: 4}
    assert parts["test"].features["label"].names == ["x", "y"]


def test_without_a_class_column_the_share_is_of_all_rows() -> None:
    parts, remarks = division.split(made([f"{i}" for i in range(40)]), {"test": 0.25}, seed=0)
    assert {name: len(part) for name, part in parts.items()} == {"test": 10, "train": 30}
    assert remarks == []


@pytest.mark.parametrize(
    "shares",
    [{}, {"test": 0.0}, {"test": 1.0}, {"validation": 0.6, "test": 0.4}, {"validation": 0.5, "test": -0.1}],
)
def test_shares_that_cannot_be_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(RequestError, match="shares"):
        division.split(made(["a"] * 40), shares, seed=0)


def test_too_few_rows_for_a_part_are_said() -> None:
    with pytest.raises(DataError, match=r"'validation' would be empty.*3 rows"):
        division.split(made(["a", "b", "a"]), {"validation": 0.1}, seed=0, by="label", text="text")


# ---------------------------------------------------------------------- drawing some of the rows


@QUICK
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    count=st.integers(1, 60),
    seed=st.integers(0, 2**16),
)
def test_a_sample_keeps_every_class_and_its_proportion(counts: list[int], count: int, seed: int) -> None:
    labels = [str(label) for label, size in enumerate(counts) for _ in range(size)]
    rows = made(labels).add_column("id", list(range(len(labels))))
    drawn = division.sample(rows, count, seed=seed, by="label")
    ids = list(drawn["id"])
    assert len(drawn) == min(count, len(rows))
    assert ids == sorted(set(ids))
    found = Counter(drawn["label"])
    if count >= len(counts):
        assert set(found) == set(labels)
    for label, size in enumerate(counts):
        share = len(drawn) * size / len(labels)
        assert abs(found[str(label)] - share) <= len(counts)


def test_a_sample_is_drawn_by_its_seed_alone() -> None:
    rows = made(["a", "b"] * 50)
    for by in ("label", None):
        one, same, other = (list(division.sample(rows, 20, seed=seed, by=by)["text"]) for seed in (1, 1, 2))
        assert one == same != other


# ---------------------------------------------------------------------- fingerprints


def test_a_fingerprint_tells_rows_and_columns() -> None:
    found = identity.fingerprint(Dataset.from_list(ROWS))
    assert found["rows"] == 4
    assert found["columns"] == ["text", "label"]
    assert len(found["sha256"]) == 64


def test_rows_at_places_are_those_taken_one_by_one() -> None:
    rows = Dataset.from_list(
        [{"a": [number] * (number % 3), "b": f"text {number}", "c": number} for number in range(9)]
    )
    places = [7, 0, 3, 3]
    assert data.at(rows, places) == [rows[place] for place in places]
    assert data.at(rows.shuffle(seed=1), places) == [rows.shuffle(seed=1)[place] for place in places]
    assert data.at(list(rows), places) == [rows[place] for place in places]
    assert data.at(rows, []) == []


def test_a_fingerprint_is_taken_once_of_rows_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_list(ROWS)
    first = identity.fingerprint(rows)
    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "__iter__", lambda self: pytest.fail("the rows are read again"))
        assert identity.fingerprint(rows) == first
    first["rows"] = 0  # the caller's own
    assert identity.fingerprint(rows)["rows"] == len(ROWS)
    column = rows.column_names[0]
    rows.set_transform(lambda batch: {column: ["other"] * len(batch[column])})
    assert identity.fingerprint(rows)["sha256"] != first["sha256"]


def test_equal_rows_have_one_fingerprint_wherever_they_come_from(tmp_path: Path) -> None:
    sources: list[Any] = [ROWS, Dataset.from_list(ROWS)]
    for kind, write in WRITERS.items():
        (tmp_path / kind).mkdir()
        write(tmp_path / kind / f"rows.{kind}", ROWS)
        sources.append(tmp_path / kind / f"rows.{kind}")
    assert len({identity.fingerprint(data.read(source)["train"])["sha256"] for source in sources}) == 1


@QUICK
@given(texts=st.lists(st.text(max_size=5), min_size=2, max_size=6), draw=st.data())
def test_order_and_every_value_count(texts: list[str], draw: st.DataObject) -> None:
    rows = [{"text": text, "label": "a"} for text in texts]
    own = identity.fingerprint(Dataset.from_list(rows))["sha256"]
    shuffled = draw.draw(st.permutations(rows))
    changed = [dict(row) for row in rows]
    position = draw.draw(st.integers(0, len(rows) - 1))
    changed[position]["text"] += "!"
    assert (identity.fingerprint(Dataset.from_list(shuffled))["sha256"] == own) == (shuffled == rows)
    assert identity.fingerprint(Dataset.from_list(changed))["sha256"] != own
    assert identity.fingerprint(Dataset.from_list(rows[:-1]))["sha256"] != own


def test_text_and_number_are_not_the_same_value() -> None:
    assert identity.fingerprint(Dataset.from_list([{"label": "1"}])) != identity.fingerprint(
        Dataset.from_list([{"label": 1}])
    )


# ---------------------------------------------------------------------- drawing a number of rows


def test_a_draw_keeps_every_class_in_proportion() -> None:
    rows = data.read([{"text": f"t{i}", "label": "rare" if i % 50 == 0 else "usual"} for i in range(200)])["train"]
    drawn = division.sample(rows, 20, seed=0, by="label")
    assert len(drawn) == 20
    assert set(drawn["label"]) == {"rare", "usual"}
    assert drawn["text"] == division.sample(rows, 20, seed=0, by="label")["text"]
    assert drawn["text"] != division.sample(rows, 20, seed=1, by="label")["text"]
    assert division.sample(rows, 500, seed=0) is rows
    many = data.read([{"text": f"t{i}", "label": f"c{i % 10}"} for i in range(100)])["train"]
    assert sorted(division.sample(many, 10, seed=3, by="label")["label"]) == sorted(f"c{i}" for i in range(10))


# ---------------------------------------------------------------------- one part in several files


def sharded(folder: Path, kind: str, stem: str = "train", of: int = 2) -> None:
    for number in range(of):
        path = folder / f"{stem}-{number:05d}-of-{of:05d}.{kind}"
        rows = [{"text": f"{stem} {number} {row}", "label": "a"} for row in range(3)]
        if kind == "parquet":
            Dataset.from_list(rows).to_parquet(path)
        elif kind == "csv":
            path.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_the_files_of_a_part_are_read_in_their_order(kind: str, tmp_path: Path) -> None:
    sharded(tmp_path, kind)
    sharded(tmp_path, kind, "test", 1)
    splits = data.read(tmp_path)
    assert list(splits["train"]["text"]) == [f"train {number} {row}" for number in range(2) for row in range(3)]
    assert list(splits["test"]["text"]) == [f"test 0 {row}" for row in range(3)]


def test_files_of_a_part_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    sharded(tmp_path, "jsonl", of=3)
    last = tmp_path / "train-00002-of-00003.jsonl"
    content = last.read_text()
    last.write_text('{"text": "a", "label": 1}\n')
    with pytest.raises(DataError, match=r"train-00002-of-00003\.jsonl.*as in train-00000-of-00003\.jsonl"):
        data.read(tmp_path)
    last.unlink()
    with pytest.raises(DataError, match=r"not whole .*train-00002-of-00003\.jsonl is missing"):
        data.read(tmp_path)
    last.write_text(content)
    extra = tmp_path / "train-00000-of-00004.jsonl"
    extra.write_text(content)
    with pytest.raises(DataError, match="not whole"):
        data.read(tmp_path)
    extra.unlink()
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(RequestError, match="two files for the split 'train'"):
        data.read(tmp_path)
