"""The matrix: every strategy on every backbone family for every task, the covers of it, and what cannot be."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import tiny

from adapters.adapt import STRATEGIES
from adapters.tasks import TASKS

# The options that a strategy needs on blocks of width 32.
OPTIONS: dict[str, dict[str, Any]] = {
    "freeze": {"layers": 1},
    "lora": {"r": 4},
    "qlora": {"r": 4},
    "dora": {"r": 4},
    "rslora": {"r": 4},
    "pissa": {"r": 4},
    "oft": {"oft_block_size": 8},
    "loha": {"r": 4},
    "peft": {"config": {"peft_type": "LOKR", "r": 4}},
}
TASK_OPTIONS: dict[str, dict[str, Any]] = {
    "text-classification": {"labels": list(tiny.LABELS)},
    "image-classification": {"labels": list(tiny.LABELS)},
    "token-classification": {"labels": ["O", "B-X", "I-X"]},
    "causal-lm": {"max_length": 12},
    "question-answering": {"max_length": 24, "stride": 4},
}
FACTORS = "lora|qlora|dora|rslora|pissa|ia3|oft|boft|loha|lokr|hra|peft"  # what stands beside a linear map
# What cannot be, and what the error says. A rule holds for every cell that its three expressions match whole.
REFUSALS: list[tuple[str, str, str, str]] = [
    # strategy, backbone, task, error
    ("bitfit", "modernbert|llama|mistral|qwen3|phi3|gemma|gemma2|mixtral|t5", ".*", "no biases to train.*Take 'lora'"),
    ("probe", ".*", "causal-lm|seq2seq|denoising", "there is no head to train.*Take 'lora'"),
    (FACTORS, "resnet", ".*", "no linear maps inside blocks.*Take 'freeze', 'bitfit', 'probe' or 'full'"),
    ("freeze", "albert", ".*", "share one set of weights.*Take 'lora'"),
    ("oft|boft|loha|lokr|hra|peft", "gpt2", ".*", "peft refuses.*Conv1D.*'lora' or 'ia3'"),
]
Cell = tuple[str, str, str]


@cache
def heads(kind: str) -> frozenset[str]:
    """Auto classes that transformers has a class for in this family."""
    import transformers as t

    config = t.CONFIG_MAPPING[kind]
    classes = {task.auto_class for task in TASKS.values()}
    return frozenset(auto for auto in classes if config in getattr(t, auto)._model_mapping)


def fits(kind: str, task: str) -> bool:
    """Whether transformers has the model class, and the family is trained for such a task at all."""
    if task == "causal-lm":
        return kind in tiny.DECODERS
    if task in ("seq2seq", "denoising"):
        return kind in tiny.ENCODER_DECODERS
    if task == "masked-lm":
        return kind in tiny.TEXT
    return TASKS[task].auto_class in heads(kind)


def refusal(cell: Cell) -> str | None:
    """What the error of a cell that cannot be says; None for a cell that must work."""
    for *patterns, said in REFUSALS:
        if all(re.fullmatch(pattern, part) for pattern, part in zip(patterns, cell, strict=True)):
            return said
    return None


@cache
def all_cells() -> tuple[Cell, ...]:
    """Every strategy row x every backbone family x every task that fits it."""
    fitting = [(kind, task) for kind in tiny.FAMILIES for task in TASKS if fits(kind, task)]
    return tuple((strategy, kind, task) for strategy in STRATEGIES for kind, task in fitting)


def cover(pairs: Iterable[Sequence[int]]) -> tuple[Cell, ...]:
    """Few cells that hold every combination of values in these positions that any cell holds; the same every time.

    Greedy: of a seeded shuffle, each time the cell with the most combinations that are still missing.
    """
    positions = [tuple(pair) for pair in pairs]
    cells = list(all_cells())
    random.Random(0).shuffle(cells)

    def combinations(cell: Cell) -> set[tuple[Any, ...]]:
        return {(pair, *(cell[place] for place in pair)) for pair in positions}

    missing = set(itertools.chain.from_iterable(map(combinations, cells)))
    chosen = []
    for most in range(len(positions), 0, -1):
        for cell in cells:
            new = combinations(cell) & missing
            if len(new) >= most:
                chosen.append(cell)
                missing -= new
    return tuple(sorted(chosen))


SAMPLE = [(0, 2), (1, 2)]  # every strategy with every task, every backbone with every task
PAIRS = [(0, 1), (0, 2), (1, 2)]


def rows(task: str, n: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Rows that a task learns from."""
    texts = tiny.rows(n, seed=seed)
    if task == "text-classification":
        return list(texts)
    if task == "image-classification":
        return [{"image": picture(number + seed), "label": row["label"]} for number, row in enumerate(texts)]
    if task == "token-classification":
        words = [row["text"].split() for row in texts]
        known = {word: tag for letter, tag in (("a", "B-X"), ("b", "I-X")) for word in tiny.WORDS[letter]}
        # Inside tags follow one of their kind, so that the spans are well formed.
        return [{"tokens": line, "tags": _tags([known.get(word, "O") for word in line])} for line in words]
    if task == "question-answering":
        made = []
        for row in texts:
            word = next(word for word in row["text"].split() if word in tiny.WORDS[row["label"]])
            made.append(
                {
                    "question": "where is it",
                    "context": row["text"],
                    "answer": word,
                    "answer_start": row["text"].find(word),
                }
            )
        return made
    if task == "seq2seq":
        return [{"source": row["text"], "target": " ".join(reversed(row["text"].split()))} for row in texts]
    if task == "next-sentence":
        half = [row["text"].split() for row in texts]
        return [
            {"first": " ".join(line[:3]), "second": " ".join(line[3:]), "label": ("is_next", "not_next")[number % 2]}
            for number, line in enumerate(half)
        ]
    return [{"text": row["text"]} for row in texts]


def _tags(tags: list[str]) -> list[str]:
    return ["B-X" if tag == "I-X" and (place == 0 or tags[place - 1] == "O") else tag for place, tag in enumerate(tags)]


def picture(seed: int, size: int = 16) -> Any:
    """A small picture of noise over a colour that follows the seed."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 80, (size, size, 3))
    base = np.eye(3, dtype=int)[seed % 3] * 150
    return Image.fromarray((noise + base).astype("uint8"))
