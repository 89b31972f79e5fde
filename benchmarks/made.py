"""Rows and a backbone made here, for a machine that has neither the data beside the checkout nor the packaged model."""

from __future__ import annotations

import os
import random
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import CACHE

SEED = 0
WIDTHS = {"small": (384, 6, 12), "base": (768, 12, 12)}  # of a BERT: width, blocks, heads
WORDS = 4000  # of the tokenizer that is trained where none comes with a model

THINGS = ("card", "transfer", "account", "payment", "statement", "loan", "voucher", "refund", "deposit", "limit")
WISHES = {
    "late": ("where is my {}", "my {} has still not arrived", "how long until the {} comes", "the {} is overdue"),
    "wrong": ("my {} is not right", "there is a mistake in the {}", "the {} shows a wrong amount", "who changed my {}"),
    "new": ("I want another {}", "can I order a {}", "how do I apply for a {}", "please set up a {} for me"),
    "stop": ("cancel my {}", "I no longer need the {}", "please close the {}", "stop the {} at once"),
    "price": ("what does a {} cost", "is there a fee for the {}", "why was I charged for my {}", "how dear is a {}"),
}
FRAMES = (
    "{}",
    "hello, {}",
    "{}, please",
    "I wonder: {}",
    "{} today",
    "since Monday I ask: {}",
    "{}, thank you",
    "so, {}",
)
PRAISE = ("a moving", "a clever", "a warm", "a gripping", "a lovely", "a fine", "an honest", "a rare")
BLAME = ("a dull", "a clumsy", "a cold", "a tired", "an empty", "a noisy", "a weak", "a dreary")
FILMS = ("film", "story", "comedy", "drama", "thriller", "tale", "portrait", "debut", "sequel", "play")
SAYINGS = ("{} {}", "it is {} {}", "what {} {}", "they made {} {}", "{} {} from start to end", "in short, {} {}")
NEUTRAL = (
    "I saw it on a Tuesday evening.",
    "It lasts about two hours.",
    "The theatre was half full.",
    "My sister came along.",
    "It is set in a harbour town.",
    "The music was written by the director.",
)


def intents(count: int, draw: random.Random) -> list[dict[str, str]]:
    """Requests to a bank, of 50 kinds."""
    kinds = [(thing, wish) for thing in THINGS for wish in WISHES]
    rows = []
    for _ in range(count):
        thing, wish = draw.choice(kinds)
        text = draw.choice(FRAMES).format(draw.choice(WISHES[wish]).format(thing))
        rows.append({"text": f"{text} ({draw.randrange(10_000)})", "label": f"{thing}_{wish}"})
    return rows


def opinions(count: int, draw: random.Random) -> list[dict[str, str]]:
    """Short opinions on films; one in four says by "not" the opposite of its words."""
    rows = []
    for number in range(count):
        liked, turned = bool(draw.randrange(2)), draw.randrange(4) == 0
        words = draw.choice(PRAISE if liked != turned else BLAME)
        text = draw.choice(SAYINGS).format(f"not {words}" if turned else words, draw.choice(FILMS))
        rows.append({"text": f"{text}, part {number}", "label": "pos" if liked else "neg"})
    return rows


def reviews(count: int, draw: random.Random) -> list[dict[str, str]]:
    """Long opinions: many sentences that say nothing, some that do, most of them to one side."""
    rows = []
    for number in range(count):
        liked = bool(draw.randrange(2))
        said = [draw.choice(PRAISE if liked != (turn == 0) else BLAME) for turn in range(4)]
        sentences = [draw.choice(SAYINGS).format(words, draw.choice(FILMS)) + "." for words in said]
        sentences += draw.choices(NEUTRAL, k=draw.randrange(6, 40))
        draw.shuffle(sentences)
        rows.append({"text": f"{' '.join(sentences)} Review {number}.", "label": "pos" if liked else "neg"})
    return rows


SETS: dict[str, Callable[[int, random.Random], list[dict[str, str]]]] = {
    "banking77": intents,
    "sst2": opinions,
    "imdb": reviews,
}


def rows(name: str, part: str, count: int) -> list[dict[str, str]]:
    """Rows in the place of a set: the same for the same count, none of the test rows among the training rows."""
    made = SETS[name](count, random.Random(f"{SEED} {name} {part}"))
    return [{**row, "text": f"{row['text']} {part}"} for row in made]


# ---------------------------------------------------------------------- backbones


def once(name: str, make: Callable[[Path], Any]) -> Path:
    """A folder under the benchmarks' cache, made at the first call and seen by others only when it is whole."""
    place = CACHE / "made" / name
    if not place.is_dir():
        stage = place.with_name(f".{name}-{secrets.token_hex(4)}")
        stage.mkdir(parents=True)
        try:
            make(stage)
            os.rename(stage, place)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    return place


def bert(size: str, tokenizer: Any = None) -> str:
    """The folder of a BERT with random weights; with a tokenizer trained on the made rows where none is given."""

    def make(folder: Path) -> None:
        import torch
        import transformers

        words = tokenizer or trained_tokenizer([row["text"] for name in SETS for row in rows(name, "train", 500)])
        width, blocks, heads = WIDTHS[size]
        torch.manual_seed(SEED)
        config = transformers.BertConfig(
            vocab_size=len(words),
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            intermediate_size=4 * width,
        )
        transformers.BertModel(config).save_pretrained(folder)
        words.save_pretrained(folder)

    return str(once(f"bert-{size}-{len(tokenizer) if tokenizer is not None else WORDS}", make))


def trained_tokenizer(texts: Sequence[str]) -> Any:
    """A WordPiece tokenizer of these texts."""
    import tokenizers
    import transformers

    inner = tokenizers.BertWordPieceTokenizer(lowercase=True)
    inner.train_from_iterator(texts, vocab_size=WORDS, show_progress=False)
    named = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep", "mask")}
    kind: Any = transformers.PreTrainedTokenizerFast
    return kind(tokenizer_object=inner._tokenizer, model_max_length=512, **named)
