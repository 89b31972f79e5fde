"""What the blocks of the documentation find when they run: files beside them, and small models under the ids they name.

A page names models that people know ("bert-base-uncased"); here each stands for a folder with a small random model of
the same family, so that a block runs offline in a moment. `ready` puts the folders in the place of the names.
"""

from __future__ import annotations

import csv
import json
import random
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import tiny

# The id that a page names -> family, the Auto class of what lies in the folder.
MODELS = {
    "bert-base-uncased": ("bert", "AutoModelForPreTraining"),
    "roberta-base": ("roberta", "AutoModel"),
    "sentence-transformers/all-MiniLM-L6-v2": ("bert", "AutoModel"),
    "gpt2": ("gpt2", "AutoModelForCausalLM"),
    "meta-llama/Llama-3.2-1B": ("llama", "AutoModelForCausalLM"),
    "meta-llama/Llama-3.1-8B": ("llama", "AutoModelForCausalLM"),
    "mistralai/Mixtral-8x7B-v0.1": ("mixtral", "AutoModelForCausalLM"),
    "t5-small": ("t5", "AutoModelForSeq2SeqLM"),
    "facebook/bart-base": ("bart", "AutoModelForSeq2SeqLM"),
    "google/vit-base-patch16-224": ("vit", "AutoModel"),
    "microsoft/resnet-18": ("resnet", "AutoModel"),
}
GOOD = ["quiet", "moving", "film", "lovely", "warm", "clever", "story", "works", "well", "again"]
BAD = ["late", "broken", "dull", "box", "crushed", "noisy", "bland", "tired", "story", "fails"]
PLAIN = [
    "the",
    "a",
    "was",
    "and",
    "it",
    "on",
    "in",
    "of",
    "to",
    "is",
    "we",
    "saw",
    "Anna",
    "New",
    "York",
    "Rome",
    "Where",
    "How",
    "many",
    "dogs",
    "cats",
    "parcel",
    "order",
    "today",
]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
GERMAN = ["ein", "Hund", "läuft", "und", "die", "Katze", "schläft", "heute"]
WORDS = tuple(dict.fromkeys(GOOD + BAD + PLAIN + NUMBERS + GERMAN + list(".?:!,")))


@cache
def _place() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="holdfast-docs-")


@cache
def model(name: str) -> str:
    """The folder that stands for an id; made once a process."""
    kind, auto = MODELS[name]
    folder = Path(_place().name) / name.replace("/", "--")
    changes = {} if kind in tiny.IMAGES else {"vocab_size": 128}
    tiny.backbone(kind, 0, auto, **changes).save_pretrained(folder)
    processor = tiny.processor(kind)
    if kind not in tiny.IMAGES:
        processor = tiny.tokenizer(tiny.config(kind).pad_token_id, WORDS)
        if kind not in tiny.TEXT:
            processor.eos_token = "[SEP]"
        if kind == "t5":
            processor.add_special_tokens({"additional_special_tokens": [f"<extra_id_{n}>" for n in range(8)]})
    processor.save_pretrained(folder)
    return str(folder)


def ready(code: str) -> str:
    """A block with the folders of small models in the place of the ids that it names in double quotes."""
    return re.sub(r'"([^"\n]+)"', lambda found: repr(model(found[1])) if found[1] in MODELS else found[0], code)


def names(page: str) -> dict[str, Any]:
    """What a page's first block finds besides the builtins, where reading rows and training are not its subject."""
    rows = texts(48)
    if page == "README.md":
        import adapters

        topics = adapters.adapt(model("roberta-base"), "lora", labels=["business", "sport", "science"])
        adapters.save(topics, "out/topics")
        return {"train": rows[:24], "val": rows[24:36], "test": rows[36:]}
    if page == "reports.md":
        import adapters

        adapters.Recipe.read("recipe.yaml", {"output": "out/sst2"}).run()
        adapted = adapters.adapt(model("roberta-base"), "lora", labels=["neg", "pos"])
        return {"trainer": adapters.Trainer(adapted, {"output_dir": "runs/mine", "max_steps": 2}, rows)}
    return {}


def texts(n: int = 40, seed: int = 0) -> list[dict[str, str]]:
    """Short reviews, all different, half of them good."""
    draw = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < n:
        label, words = ("pos", GOOD) if len(found) % 2 else ("neg", BAD)
        found.setdefault(" ".join(draw.sample(PLAIN, 3) + draw.sample(words, 3)), label)
    return [{"text": text, "label": label} for text, label in found.items()]


def files(folder: Path) -> None:
    """The files that pages speak of, put where their blocks run."""
    recipe = {"model": model("roberta-base"), "data": "reviews.csv", "output": "out/reviews", "train": {"max_steps": 2}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    for name, rows in (("reviews.csv", texts()), ("test.csv", texts(12, 1))):
        with (folder / name).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
    entities = [
        {"tokens": ["we", "saw", "Anna", "in", "New", "York"], "tags": ["O", "O", "B-PER", "O", "B-LOC", "I-LOC"]},
        {"tokens": ["Anna", "was", "in", "Rome", str(NUMBERS[0])], "tags": ["B-PER", "O", "O", "B-LOC", "O"]},
    ]
    _jsonl(folder / "entities.jsonl", _numbered(entities, "tokens", 16))
    asked = {"question": "Where was Anna?", "answers": {"text": ["Rome"], "answer_start": [15]}}
    _jsonl(folder / "squad.jsonl", [{**asked, "context": f"We saw Anna in Rome. {n}"} for n in NUMBERS])
    _jsonl(
        folder / "chats.jsonl",
        [
            {"messages": [{"role": "user", "content": f"How many {n}?"}, {"role": "assistant", "content": n}]}
            for n in NUMBERS
        ],
    )
    (folder / "corpus.txt").write_text("\n\n".join(row["text"] for row in texts(24, 2)) + "\n", encoding="utf-8")
    _pictures(folder)


def _numbered(rows: list[dict[str, Any]], column: str, n: int) -> list[dict[str, Any]]:
    """Rows over and over, each made different from the others by a word in front."""
    found = []
    for number in range(n):
        row = rows[number % len(rows)]
        found.append({**row, column: [WORDS[number], *row[column]], "tags": ["O", *row["tags"]]})
    return found


def _jsonl(file: Path, rows: list[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _pictures(folder: Path) -> None:
    """Dark cats, light dogs."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for label, level in (("cat", 60), ("dog", 190)):
        (folder / "pets" / label).mkdir(parents=True)
        for number in range(8):
            pixels = np.clip(draw.normal(level, 20, (16, 16, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / "pets" / label / f"{number}.png")
        Image.fromarray(pixels).save(folder / f"{label}.png")
