"""Which task rows are for, and which of their columns play which part in it; told from names and contents."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from adapters import conversations, formats
from adapters.errors import DataError, RequestError, message
from adapters.labels import NUMBER, SEPARATOR, class_names

if TYPE_CHECKING:
    from datasets import Dataset

LOOKED_AT = 5000  # rows whose values are looked at
# In this order: the first name that a column has is taken.
LABELS: tuple[str, ...] = (
    *("label", "labels", "class", "category", "sentiment", "intent", "target", "stars", "rating", "topic", "tag"),
    *("mood", "emotion", "genre", "type", "y", "score", "similarity_score", "gold", "answer"),
)
TEXTS: tuple[str, ...] = (
    *("text", "review", "sentence", "content", "body", "message", "comment", "tweet", "utterance", "document"),
    *("description", "abstract", "question", "query", "title", "subject", "name"),
)
PAIRS = (
    ("text", "text_pair"),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("sentence_a", "sentence_b"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("query", "passage"),
)
TURNED = (  # source and target of a task that writes a text anew
    ("source", "target"),
    ("document", "summary"),
    ("article", "highlights"),
    ("article", "summary"),
    ("dialogue", "summary"),
    ("text", "summary"),
    ("input", "target"),
)
ASKED = (  # prompt and completion
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("question", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
)
LANGUAGES = re.compile(r"[a-z]{2}(_[A-Z]{2})?")
FORMS = {  # the task columns that a known format gives -> the task
    frozenset(("tokens", "tags")): "token-classification",
    frozenset(("id", "question", "context", "answers")): "question-answering",
    frozenset(("messages",)): "causal-lm",
    frozenset(("prompt", "completion")): "causal-lm",
    frozenset(("source", "target")): "seq2seq",
    frozenset(("first", "second", "label")): "next-sentence",
    frozenset(("image", "label")): "image-classification",
    frozenset(("text", "label")): "text-classification",
    frozenset(("text", "text_pair", "label")): "text-classification",
}


@final
@dataclass(frozen=True)
class Roles:
    """What rows are for.

    Attributes:
        task: a task's name.
        why: the reason, in a few words.
        columns: task column -> column of the data, where the names differ.
        reasons: task column -> why it is this one.
        options: options of the task that the contents ask for, such as the problem "regression".
    """

    task: str
    why: str
    columns: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class _Column:
    """What stands in a column."""

    name: str
    values: Sequence[Any]
    words: bool
    lists: bool
    picture: bool

    @property
    def length(self) -> float:
        """Characters of a value, on average."""
        return sum(len(str(value)) for value in self.values) / max(1, len(self.values))

    @property
    def different(self) -> int:
        """How many different values there are."""
        return len({str(value) for value in self.values})

    @property
    def numbers(self) -> bool:
        """Whether all values are numbers."""
        return all(NUMBER.fullmatch(str(value).strip()) for value in self.values)


def find(rows: Dataset, task: str | None, given: Mapping[str, str], plain: str) -> Roles:
    """The task and the columns of rows.

    Args:
        rows: as they were read.
        task: where it is known.
        given: task column -> column of the data, as the user says.
        plain: the task for plain texts.

    Raises:
        DataError: nothing tells; names the columns, and how to say which is which.
    """
    columns = [_looked_at(rows, name) for name in rows.column_names]
    known = {column.name: column for column in columns}
    form = _format(rows)
    pictures = [column for column in columns if column.picture]
    goal = task or ("image-classification" if pictures else None)
    if goal is None and form is not None and form.gives in FORMS and not given:
        return Roles(FORMS[form.gives], f"the columns are those of {form.name}: {', '.join(sorted(form.needs))}")
    if goal is None and not given:
        for pairs, name, parts in (
            (TURNED, "seq2seq", ("source", "target")),
            (ASKED, "causal-lm", ("prompt", "completion")),
        ):
            pair = next((pair for pair in pairs if set(pair) <= set(known) and _are_texts(known, pair)), None)
            if pair is not None:
                return _paired(name, f"columns {pair[0]!r} and {pair[1]!r}", parts, pair)
    languages = [name for name, column in known.items() if LANGUAGES.fullmatch(name) and column.words]
    if goal is None and not given and len(languages) == 2:
        why = f"two languages, from {languages[0]} to {languages[1]}; the other way round, swap the two"
        return _paired("seq2seq", why, ("source", "target"), languages)
    if form is not None and goal is not None and not given and FORMS.get(form.gives) == goal:
        why = "as you said" if task else f"pictures in the column {pictures[0].name!r}"
        return Roles(goal, why, options=_problem(known.get("label")))
    if goal == "seq2seq" and not given:
        return _paired(goal, "as you said", ("source", "target"), _two_texts(columns, TURNED, goal))
    if goal == "causal-lm" and not given:
        pair = next((pair for pair in ASKED if set(pair) <= set(known)), None)
        if pair is not None:
            return _paired(goal, "as you said", ("prompt", "completion"), pair)
    if goal in ("token-classification", "question-answering") and not given:
        return _by_synonym(goal, known)
    return _classes_or_texts(columns, known, task, given, plain)


def _format(rows: Dataset) -> formats.Format | None:
    sample = rows.select(range(min(formats.SAMPLE, len(rows))))
    turns = [name for name in conversations.TURNS if name in rows.column_names]
    try:
        return formats.detect(rows.column_names, sample.select_columns(turns).to_list() if turns else [])
    except RequestError:
        return None


def _looked_at(rows: Dataset, name: str) -> _Column:
    if type(rows.features[name]).__name__ == "Image":
        return _Column(name, (), words=False, lists=False, picture=True)
    values = [value for value in rows.select(range(min(LOOKED_AT, len(rows))))[name] if value not in (None, "", [])]
    words = bool(values) and all(isinstance(value, str) for value in values)
    return _Column(name, values, words, bool(values) and all(isinstance(value, list) for value in values), False)


def _are_texts(known: Mapping[str, _Column], names: Sequence[str]) -> bool:
    return all(known[name].words and not known[name].numbers for name in names)


def _paired(task: str, why: str, parts: Sequence[str], pair: Sequence[str]) -> Roles:
    columns = {part: name for part, name in zip(parts, pair, strict=True) if part != name}
    return Roles(task, why, columns, dict.fromkeys(columns, "by its name"))


def _two_texts(columns: Sequence[_Column], pairs: Sequence[tuple[str, str]], task: str) -> tuple[str, str]:
    names = [column.name for column in columns]
    pair = next((pair for pair in pairs if set(pair) <= set(names)), None)
    texts = [column.name for column in columns if column.words and not column.numbers]
    languages = [name for name in texts if LANGUAGES.fullmatch(name)]
    for found in (pair, languages, texts):
        if found is not None and len(found) == 2:
            return found[0], found[1]
    raise _unknown(columns, task, "source=... --column target=...")


def _by_synonym(task: str, known: Mapping[str, _Column]) -> Roles:
    """The columns of tokens and tags, or of questions, by the names that they go by."""
    tokens = {"tokens": ("tokens", "words", "sentence"), "tags": ("tags", "ner_tags", "labels", "pos_tags", "ner")}
    asked = {
        "question": ("question", "query"),
        "context": ("context", "passage", "paragraph", "document", "text"),
        "answers": ("answers", "answer"),
    }
    columns, reasons = {}, {}
    for part, names in (tokens if task == "token-classification" else asked).items():
        found = next((name for name in names if name in known), None)
        if found is None:
            raise _unknown(list(known.values()), task, f"{part}=...")
        if found != part:
            columns[part], reasons[part] = found, "by its name"
    return Roles(task, "as you said", columns, reasons)


def _classes_or_texts(
    columns: Sequence[_Column], known: Mapping[str, _Column], task: str | None, given: Mapping[str, str], plain: str
) -> Roles:
    """Texts or pictures with labels, or texts alone."""
    chosen = {part: name for part, name in given.items() if name in known}
    reasons = dict.fromkeys(chosen, "as you said")
    pictures = [column.name for column in columns if column.picture]
    wants_label = task is None or task in ("text-classification", "image-classification")
    if (task == "image-classification" or (task is None and pictures)) and "image" not in chosen:
        if not pictures and "image" not in known:
            raise _unknown(columns, "image-classification", "image=...")
        chosen["image"] = pictures[0] if pictures else "image"
    label = known[chosen["label"]] if "label" in chosen else None
    if wants_label and label is None:
        label, why = _label(columns, set(chosen.values()))
        if label is not None:
            chosen["label"], reasons["label"] = label.name, why
    if wants_label and label is None and task is not None:
        raise _unknown(columns, task, "label=...")
    if not pictures and not {"text", "prompt", "source", "tokens", "first", "messages"} & set(chosen):
        pair = next((pair for pair in PAIRS if set(pair) <= set(known)), None)
        if pair is not None and label is not None:
            chosen |= {"text": pair[0], "text_pair": pair[1]}
            reasons |= dict.fromkeys(("text", "text_pair"), "a pair by their names")
        else:
            text, why = _text(columns, set(chosen.values()))
            if text is None:
                raise _unknown(columns, task or "any task", "text=...")
            chosen["text"], reasons["text"] = text.name, why
    if label is not None and wants_label:
        goal = task or ("image-classification" if pictures else "text-classification")
        problem = _problem(label)
        held = "numbers" if problem.get("problem") == "regression" else f"{label.different} different values"
        why = f"{'pictures' if pictures else 'texts'}, and a column {label.name!r} of {held}"
        why = "as you said" if task else why
        return Roles(goal, why, {p: n for p, n in chosen.items() if p != n}, reasons, problem)
    goal = task or plain
    why = "as you said" if task else "texts without a column of labels"
    return Roles(goal, why, {part: name for part, name in chosen.items() if part != name}, reasons)


def _label(columns: Sequence[_Column], taken: set[str]) -> tuple[_Column | None, str]:
    """The column of labels: by its name, else the one of the fewest different short values that repeat."""
    free = [column for column in columns if column.name not in taken and column.values and not column.picture]
    for name in LABELS:
        for column in free:
            short = column.lists or column.length <= 60
            if column.name.lower() == name and short and (column.different > 1):
                return column, "by its name"
    few = [
        c for c in free if not c.lists and 2 <= c.different <= max(2, min(50, len(c.values) // 5)) and c.length <= 40
    ]
    if not few:
        return None, ""
    best = min(few, key=lambda column: column.different)
    return best, f"{best.different} different values in {len(best.values)} rows"


def _text(columns: Sequence[_Column], taken: set[str]) -> tuple[_Column | None, str]:
    """The column of texts: the longest, where not one of several has a text's name."""
    free = [column for column in columns if column.name not in taken and column.words and not column.numbers]
    if not free:
        return None, ""
    longest = max(free, key=lambda column: column.length)
    if len(free) == 1:
        return longest, "the only texts"
    for name in TEXTS:
        named = next((column for column in free if column.name.lower() == name), None)
        if named is not None and named.length * 4 >= longest.length:
            return named, "by its name"
    return longest, "the longest texts"


def _problem(label: _Column | None) -> dict[str, str]:
    """The problem that labels pose where it is not a choice of one."""
    if label is None or not label.values:
        return {}
    if label.lists or sum(SEPARATOR in str(value) for value in label.values) * 10 > len(label.values):
        return {"problem": "multi-label"}
    whole = all(re.fullmatch(r"-?\d+", str(value).strip()) for value in label.values)
    if label.numbers and not (whole and label.different <= 20):
        return {"problem": "regression"}
    return {}


def names_of(rows: Dataset, column: str) -> list[str]:
    """The label names that a data set brings with it; empty for none."""
    return class_names(rows, column) if column in rows.column_names else []


def _unknown(columns: Sequence[_Column], task: str, example: str) -> DataError:
    return DataError(
        message(
            f"the columns do not tell which is which for {task}",
            where="data",
            found=", ".join(column.name for column in columns),
            remedy=f"Say it: --column {example}, or another --task.",
        )
    )
