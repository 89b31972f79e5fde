"""Rows come in many formats: each is recognised by its columns, said, and brought to the task's columns; or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Translation, Value

from adapters import data, formats, labels
from adapters.errors import AdaptersError, DataError, RequestError

CAUSAL = dict.fromkeys(["text", "prompt", "completion", "messages"], "")
CLASSIFICATION = dict.fromkeys(["text", "text_pair", "label"], "")
SEQ2SEQ = dict.fromkeys(["source", "target"], "")
TOKENS = dict.fromkeys(["tokens", "tags"], "")
QUESTIONS = dict.fromkeys(["id", "question", "context", "answers"], "")
IMAGES = dict.fromkeys(["image", "label"], "")
TEXT = {"text": ""}
SENTENCES = dict.fromkeys(["text", "first", "second", "label"], "")

ASKED = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
SHAREGPT = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Rivers",
            "paragraphs": [
                {
                    "context": "The Oder flows north.",
                    "qas": [
                        {
                            "id": "q1",
                            "question": "What flows?",
                            "answers": [{"text": "Oder", "answer_start": 4}, {"text": "The Oder", "answer_start": 0}],
                        },
                        {"id": "q2", "question": "Who walks?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}


def rows_of(*rows: dict[str, Any]) -> Dataset:
    return data.one(list(rows))


def arranged(
    known: dict[str, str], *rows: dict[str, Any], columns: dict[str, str] | None = None
) -> tuple[list[dict[str, Any]], str]:
    made, remark = formats.arrange(rows_of(*rows), columns, known)
    return made.to_list(), remark


def refused(kind: type[AdaptersError], known: dict[str, str], *rows: dict[str, Any], **options: Any) -> str:
    with pytest.raises(AdaptersError) as caught:
        arranged(known, *rows, **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------- recognised

FOUND = {
    "text": (CAUSAL, {"text": "a"}, "text"),
    "text among others": (TEXT, {"text": "a", "label": "x", "id": 3}, "text"),
    "prompt": (CAUSAL, {"prompt": "a", "completion": "b"}, "prompt and completion"),
    "prompt to be completed": (CAUSAL, {"prompt": "a"}, "prompt and completion"),
    "messages": (CAUSAL, {"messages": ASKED}, "messages"),
    "messages under another name": (CAUSAL, {"conversations": ASKED}, "messages"),
    "messages beside a prompt alone": (CAUSAL, {"prompt": "a", "prompt_id": "7", "messages": ASKED}, "messages"),
    "sharegpt": (CAUSAL, {"conversations": SHAREGPT}, "sharegpt"),
    "sharegpt under a chat's name": (CAUSAL, {"messages": SHAREGPT}, "sharegpt"),
    "alpaca": (CAUSAL, {"instruction": "a", "input": "", "output": "b"}, "alpaca"),
    "classification": (CLASSIFICATION, {"text": "a", "label": "x"}, "classification"),
    "texts to be classified": (CLASSIFICATION, {"text": "a"}, "text"),
    "pairs": (CLASSIFICATION, {"text": "a", "text_pair": "b", "label": "x"}, "pairs"),
    "pairs to be classified": (CLASSIFICATION, {"text": "a", "text_pair": "b"}, "pairs"),
    "sentence pairs": (SENTENCES, {"first": "a", "second": "b", "label": "x"}, "pairs"),
    "tags": (TOKENS, {"tokens": ["a"], "tags": ["O"]}, "tokens and tags"),
    "ner_tags": (TOKENS, {"tokens": ["a"], "pos_tags": ["N"], "ner_tags": ["O"]}, "tokens and ner_tags"),
    "tokens alone": (TOKENS, {"tokens": ["a"]}, "tokens and tags"),
    "questions": (
        QUESTIONS,
        {"id": "1", "question": "a", "context": "b", "answers": {"text": ["b"], "answer_start": [0]}},
        "question answering",
    ),
    "questions alone": (QUESTIONS, {"question": "a", "context": "b"}, "question answering"),
    "source and target": (SEQ2SEQ, {"source": "a", "target": "b"}, "source and target"),
    "images": (IMAGES, {"image": "a.png", "label": "x"}, "images"),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_format_is_recognised_by_its_columns_and_said(name: str) -> None:
    known, row, wanted = FOUND[name]
    made, remark = arranged(known, row, row | ({"id": "2"} if "id" in row and known is QUESTIONS else {}))
    assert remark.startswith(f"detected: {wanted}, 2 rows")
    assert set(made[0]) & set(known)
    again, said = formats.normalise(Dataset.from_list(made), known)
    assert again.to_list() == made  # what is in the task's columns stays as it is
    assert said.startswith("detected: ")


def test_detect_looks_at_nothing_but_its_arguments() -> None:
    found = formats.detect(["conversations", "id"], [{"conversations": SHAREGPT}])
    assert found is not None
    assert (found.name, found.gives) == ("sharegpt", {"messages"})
    assert formats.detect(["a", "b"], []) is None
    assert formats.detect(["input_ids", "labels"], [], CAUSAL) is None


AMBIGUOUS = {
    "text and alpaca": ({"instruction": "a", "input": "", "output": "b", "text": "c"}, ("text", "alpaca")),
    "text and messages": ({"text": "a", "messages": ASKED}, ("text", "messages")),
    "two conversations": ({"messages": ASKED, "conversations": SHAREGPT}, ("messages", "sharegpt")),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_several_readings_are_refused_until_a_column_is_named(name: str) -> None:
    row, readings = AMBIGUOUS[name]
    said = refused(RequestError, CAUSAL, row)
    assert "several ways" in said
    assert all(reading in said for reading in readings)
    assert "columns={" in said


def test_a_named_column_decides_between_readings() -> None:
    row = {"instruction": "a", "input": "", "output": "b", "text": "c"}
    made, remark = arranged(CAUSAL, row, columns={"text": "text"})
    assert remark == "detected: text, 1 rows"
    assert made[0]["text"] == "c"
    made, remark = arranged(CAUSAL, row, columns={"instruction": "instruction"})
    assert remark.startswith("detected: alpaca")
    assert made[0]["messages"][0]["content"] == "a"
    row = {"tokens": ["x"], "pos_tags": ["N"], "ner_tags": ["O"]}
    made, remark = arranged(TOKENS, row, columns={"tags": "pos_tags"})
    assert made == [{"tokens": ["x"], "tags": ["N"]}]


def test_what_was_not_chosen_is_not_found_by_a_second_look() -> None:
    row = {"id": 1, "instruction": "a", "input": "", "output": "b", "text": "c"}
    once, _ = formats.arrange(rows_of(row), {"instruction": "instruction"}, CAUSAL)
    assert once.column_names == ["id", "messages"]
    assert formats.arrange(once, None, CAUSAL)[0].to_list() == once.to_list()


def test_rows_for_another_task_are_refused_by_name() -> None:
    said = refused(DataError, CLASSIFICATION, {"conversations": SHAREGPT})
    assert "sharegpt, which the task does not take" in said
    assert "text_pair" in said
    assert "question answering" in refused(DataError, CAUSAL, {"question": "a", "context": "b", "answers": None})


def test_rows_of_no_known_format_are_left_to_the_task() -> None:
    row = {"sentence": "a", "stars": 3}
    assert arranged(CLASSIFICATION, row) == ([row], "")
    assert arranged({"sentence": ""}, row) == ([row], "")


# ---------------------------------------------------------------------- conversations


def test_sharegpt_becomes_messages() -> None:
    row = {
        "id": "7",
        "conversations": [
            {"from": "system", "value": "be kind"},
            {"from": "human", "value": "add 1 and 2"},
            {"from": "gpt", "value": "calling"},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "it is 3"},
        ],
    }
    made, remark = arranged(CAUSAL, row, row | {"conversations": SHAREGPT}, row | {"conversations": SHAREGPT})
    assert remark == "detected: sharegpt, 3 rows, median 2 turns"
    assert set(made[0]) == {"id", "messages"}
    assert [turn["role"] for turn in made[0]["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert [turn["content"] for turn in made[0]["messages"]] == ["be kind", "add 1 and 2", "calling", "3", "it is 3"]
    assert made[1]["messages"] == ASKED


def test_a_system_column_opens_the_conversation_and_an_empty_system_turn_goes() -> None:
    made, _ = arranged(CAUSAL, {"system": "be kind", "conversations": SHAREGPT})
    assert made[0] == {"messages": [{"role": "system", "content": "be kind"}, *ASKED]}
    made, _ = arranged(CAUSAL, {"system": "", "conversations": [{"from": "system", "value": " "}, *SHAREGPT]})
    assert made[0] == {"messages": ASKED}


def test_two_system_texts_are_refused() -> None:
    row = {"system": "be kind", "messages": [{"role": "system", "content": "be short"}, *ASKED]}
    assert "two system texts (row 0" in refused(DataError, CAUSAL, row)
    assert arranged(CAUSAL, row | {"system": ""})[0] == [{"messages": row["messages"]}]


def test_other_keys_of_a_turn_are_said() -> None:
    turns = [{"role": "user", "content": "hello", "name": "Ada"}, {"role": "assistant", "content": "hi"}]
    made, remark = arranged(CAUSAL, {"messages": turns})
    assert made[0]["messages"] == ASKED
    assert remark == "detected: messages, 1 rows, median 2 turns, not read of a turn: name"


def test_alpaca_becomes_messages() -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "", "history": []}
    full = row | {"input": "", "system": "be kind", "history": [["hello", "hi"]]}
    made, remark = arranged(CAUSAL, row, full)
    assert remark == "detected: alpaca, 2 rows, median 3.5 turns"
    assert made[0] == {
        "messages": [{"role": "user", "content": "Add.\n1 and 2"}, {"role": "assistant", "content": "3"}]
    }
    assert made[1]["messages"] == [
        {"role": "system", "content": "be kind"},
        *ASKED,
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "3"},
    ]


def test_columns_may_be_named_as_a_format_names_them() -> None:
    row = {"instruction": "Add.", "context": "1 and 2", "response": "3"}
    made, _ = arranged(CAUSAL, row, columns={"input": "context", "output": "response"})
    assert made[0]["messages"][0] == {"role": "user", "content": "Add.\n1 and 2"}
    assert made[0]["messages"][1] == {"role": "assistant", "content": "3"}


def turn(**changes: Any) -> dict[str, Any]:
    return {"role": "user", "content": "hello"} | changes


FAULTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "an unknown role": ({"messages": [turn(), turn(role="bot")]}, ("'bot'", "row 1", "turn 1", "assistant")),
    "a misspelt role": ({"messages": [turn(role="asistant")]}, ("row 1", "Did you mean 'assistant'")),
    "no turns": ({"messages": []}, ("empty conversation", "row 1", "'messages'")),
    "nothing": ({"messages": None}, ("empty conversation", "row 1")),
    "an empty system turn alone": ({"messages": [turn(role="system", content="")]}, ("empty conversation", "row 1")),
    "an empty turn": ({"messages": [turn(), turn(role="assistant", content=" ")]}, ("empty text", "row 1", "turn 1")),
    "no content": ({"messages": [turn(content=None)]}, ("another form", "row 1", "turn 0")),
    "from and value": ({"messages": [{"from": "human", "value": "a"}]}, ("another form", "row 1", "from, value")),
    "tool calls": (
        {"messages": [turn(), {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]},
        ("'tool_calls'", "not read", "row 1", "turn 1"),
    ),
    "a weight": ({"messages": [turn(), turn(role="assistant", weight=0)]}, ("'weight'", "row 1", "found 0")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_conversation_that_cannot_be_read_is_named_by_row_and_turn(name: str) -> None:
    row, said = FAULTS[name]
    text = refused(DataError, CAUSAL, {"messages": ASKED}, row)
    for words in said:
        assert words in text


def test_turns_of_no_form_text_and_unknown_speakers_are_refused() -> None:
    assert "no list" in refused(DataError, CAUSAL, {"messages": "user: hello"})
    assert "another form" in refused(DataError, CAUSAL, {"messages": [{"speaker": "a", "text": "b"}]})
    odd = {"conversations": [{"from": "human", "value": "a"}, {"from": "bob", "value": "b"}]}
    said = refused(DataError, CAUSAL, {"conversations": SHAREGPT}, odd)
    assert "unknown role 'bob' (row 1, column 'conversations', turn 1)" in said
    assert "gpt" in said
    mixed = {"conversations": [{"role": "user", "content": "a"}]}
    assert "row 1" in refused(DataError, CAUSAL, {"conversations": SHAREGPT}, mixed)


ALPACA_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no instruction": ({"instruction": " ", "output": "b"}, "row 1, column 'instruction'"),
    "no output": ({"instruction": "a", "output": None}, "row 1, column 'output'"),
    "history of one": ({"instruction": "a", "output": "b", "history": [["c"]]}, "row 1, column 'history'"),
}


@pytest.mark.parametrize("name", ALPACA_FAULTS)
def test_alpaca_rows_without_their_texts_are_refused(name: str) -> None:
    row, where = ALPACA_FAULTS[name]
    good = {"instruction": "a", "output": "b"} | ({"history": [["c", "d"]]} if "history" in row else {})
    assert where in refused(DataError, CAUSAL, good, row)


# ---------------------------------------------------------------------- tokens and tags


def test_ner_tags_become_tags_and_their_class_numbers_have_names() -> None:
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-PER"]))})
    rows = Dataset.from_dict({"tokens": [["Ada", "writes"]], "ner_tags": [[1, 0]]}, features=features)
    made, _ = formats.normalise(rows, TOKENS)
    assert made.column_names == ["tokens", "tags"]
    assert labels.class_names(made, "tags") == ["O", "B-PER"]
    assert labels.named(made, made[0]["tags"], "tags") == ["B-PER", "O"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, ("one tag for each of 2 tokens", "row 1, column 'tags'")),
        ({"tokens": ["a"], "tags": None}, ("one tag for each", "row 1, column 'tags'")),
        ({"tokens": [], "tags": []}, ("not a list of words", "row 1, column 'tokens'")),
        ({"tokens": None, "tags": ["O"]}, ("not a list of words", "row 1, column 'tokens'")),
    ],
)
def test_tokens_and_tags_that_do_not_match_are_refused(row: dict[str, Any], said: tuple[str, ...]) -> None:
    text = refused(DataError, TOKENS, {"tokens": ["a"], "tags": ["O"]}, row)
    for words in said:
        assert words in text


# ---------------------------------------------------------------------- questions


@pytest.mark.parametrize("indent", [None, 1])
def test_squad_is_flattened(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(SQUAD, indent=indent), encoding="utf-8")
    made, remark = formats.arrange(data.one(path), None, QUESTIONS)
    assert remark == "detected: question answering, 2 rows, 1 without an answer"
    context = SQUAD["data"][0]["paragraphs"][0]["context"]  # type: ignore[index]
    assert made.to_list() == [
        {
            "id": "q1",
            "title": "Rivers",
            "question": "What flows?",
            "context": context,
            "answers": {"text": ["Oder", "The Oder"], "answer_start": [4, 0]},
        },
        {
            "id": "q2",
            "title": "Rivers",
            "question": "Who walks?",
            "context": context,
            "answers": {"text": [], "answer_start": []},
        },
    ]


def test_a_squad_paragraph_without_its_fields_is_named(tmp_path: Path) -> None:
    broken = json.loads(json.dumps(SQUAD))
    del broken["data"][0]["paragraphs"][0]["context"]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(DataError, match=r"train\.json, article 0, paragraph 0.*'context'"):
        data.read(path)


def test_answers_take_one_form_and_ids_are_made_where_there_are_none() -> None:
    rows = [
        {"question": "a", "context": "b c", "answers": [{"text": "c", "answer_start": 2}]},
        {"question": "d", "context": "b c", "answers": []},
    ]
    made, remark = arranged(QUESTIONS, *rows)
    assert [row["id"] for row in made] == ["0", "1"]
    assert [row["answers"] for row in made] == [
        {"text": ["c"], "answer_start": [2]},
        {"text": [], "answer_start": []},
    ]
    assert remark.endswith("1 without an answer")
    made, _ = arranged(QUESTIONS, rows[0] | {"id": 31})
    assert made[0]["id"] == "31"


@pytest.mark.parametrize(
    "answers",
    [{"text": ["b", "c"], "answer_start": [0]}, {"text": ["b"], "start": [0]}, ["b"], {"text": "b", "answer_start": 0}],
)
def test_answers_of_another_form_are_refused(answers: Any) -> None:
    said = refused(DataError, QUESTIONS, {"question": "a", "context": "b", "answers": answers})
    assert "row 0, column 'answers'" in said
    assert "answer_start" in said


def test_an_id_twice_is_refused() -> None:
    row = {"id": "x", "question": "a", "context": "b"}
    assert "'x' stands twice (rows 0 and 2" in refused(DataError, QUESTIONS, row, row | {"id": "y"}, row)


# ---------------------------------------------------------------------- translations


def test_languages_become_source_and_target_as_the_columns_say() -> None:
    flat = {"en": "cat", "de": "Katze"}
    wanted = [{"source": "Katze", "target": "cat"}]
    columns = {"source": "de", "target": "en"}
    assert arranged(SEQ2SEQ, flat, columns=columns)[0] == wanted
    made, remark = arranged(SEQ2SEQ, {"translation": flat}, columns=columns)
    assert made == wanted
    assert remark == "detected: source and target, 1 rows"
    typed = Dataset.from_list([{"translation": flat}], features=Features({"translation": Translation(["de", "en"])}))
    assert formats.arrange(typed, columns, SEQ2SEQ)[0].to_list() == wanted


def test_a_translation_without_a_direction_or_with_another_language_is_refused() -> None:
    row = {"translation": {"en": "cat", "de": "Katze"}}
    said = refused(RequestError, SEQ2SEQ, row)
    assert "which language is the source" in said
    assert "columns={'source': 'en', 'target': 'de'}" in said
    said = refused(DataError, SEQ2SEQ, row, columns={"source": "en", "target": "fr"})
    assert "no column 'fr'" in said
    assert "de" in said
