"""What the benchmark of the tasks measures: its rows, and the form of a run and of a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness import ROOT, rate

SHARED = ROOT.parent / "shared"
SIDES = OURS, PEER = ("ours", "peer")
MINILM, VIT, LLAMA, T5 = ("MiniLM", "vit-cifar10-tintn", "stories260K-llama", "a T5 made here")
EMBEDDED = "the embedded support set"  # takes the place of sst2 where ../shared is absent


@dataclass(frozen=True)
class Size:
    """How much a run sees."""

    train: int  # rows, at most; of a row with packing, texts
    test: int
    epochs: int


@dataclass(frozen=True)
class Score:
    """A number of the table."""

    key: str
    title: str
    factor: float = 100.0  # shares are shown in percent
    digits: int = 1
    higher: bool = True  # is better


@dataclass(frozen=True)
class Row:
    """One task on one set of rows with one backbone; both sides get everything that stands here."""

    task: str
    data: str  # below ../shared/data
    backbone: str
    strategy: str
    learning_rate: float
    batch_size: int
    quick: Size
    full: Size
    scores: tuple[Score, ...]
    options: Mapping[str, Any] = field(default_factory=dict)  # the task's
    columns: Mapping[str, str] = field(default_factory=dict)  # task column -> source column
    same: str = ""  # what else is the same on both sides, and what is not


ACCURACY = Score("accuracy", "accuracy, %")
ROWS: dict[str, Row] = {
    "sst2": Row(
        *("text-classification", "sst2", MINILM, "lora", 1e-3, 16),
        *(Size(1000, 800, 3), Size(6920, 1821, 3)),
        scores=(ACCURACY,),
        options={"max_length": 128},
        same="The head is transformers' own on both sides.",
    ),
    "imdb": Row(
        *("text-classification", "imdb", MINILM, "lora", 2e-3, 16),
        *(Size(600, 400, 3), Size(4000, 2000, 2)),
        scores=(ACCURACY,),
        options={"max_length": 128},
        same="Reviews are cut to 128 tokens on both sides.",
    ),
    "wnut17": Row(
        *("token-classification", "wnut17", MINILM, "full", 3e-4, 8),
        *(Size(800, 400, 6), Size(3394, 1287, 6)),
        scores=(Score("f1", "entity F1, %"), Score("accuracy", "accuracy over words, %")),
        options={"max_length": 128},
        same="A word's tag is learnt at its first token on both sides.",
    ),
    "xquad": Row(
        *("question-answering", "xquad-en", MINILM, "lora", 2e-3, 16),
        *(Size(600, 150, 3), Size(953, 237, 8)),
        scores=(Score("f1", "F1 over words, %"), Score("exact_match", "exact match, %")),
        options={"max_length": 192, "stride": 64},
        same="The same windows; the peer chooses the best of 20 starts and ends, as transformers' example does.",
    ),
    "multi30k": Row(
        *("seq2seq", "multi30k", T5, "full", 2e-3, 32),
        *(Size(4000, 200, 10), Size(29000, 1000, 10)),
        scores=(Score("chrf", "chrF", 1), Score("bleu", "BLEU", 1)),
        options={"max_length": 64, "max_target_length": 64, "scores": "translation", "max_new_tokens": 48},
        columns={"source": "en", "target": "de"},
        same="Seq2SeqTrainer and DataCollatorForSeq2Seq from the same random weights; greedy search on both sides.",
    ),
    "tinyshakespeare": Row(
        *("causal-lm", "text/tinyshakespeare.txt", LLAMA, "lora", 5e-3, 8),
        *(Size(2000, 200, 2), Size(6500, 700, 5)),
        scores=(Score("perplexity", "perplexity", 1, 2, higher=False),),
        options={"max_length": 256},
        same="Both sides get the very same packed blocks.",
    ),
    "gsm8k": Row(
        *("causal-lm", "gsm8k", LLAMA, "lora", 5e-3, 8),
        *(Size(800, 150, 2), Size(7473, 1319, 3)),
        scores=(Score("loss", "nats a token of the answers", 1, 3, higher=False),),
        options={"max_length": 512},
        same="Both sides get the very same rows, of which only the answers are learnt.",
    ),
    "mnist": Row(
        *("image-classification", "mnist", VIT, "lora", 5e-3, 16),
        *(Size(2000, 500, 8), Size(2000, 500, 12)),
        scores=(ACCURACY,),
        same="The head begins on both sides as the one of CIFAR-10, which has ten classes too.",
    ),
    "cifar10": Row(
        *("image-classification", "cifar10", VIT, "lora", 2e-3, 16),
        *(Size(1500, 500, 4), Size(2000, 500, 6)),
        scores=(ACCURACY,),
        same="The backbone was trained on CIFAR-10, so there is little to gain.",
    ),
    "wikitext": Row(
        *("masked-lm", "text", MINILM, "lora", 2e-3, 16),
        *(Size(400, 30, 3), Size(2000, 50, 6)),
        scores=(
            Score("pseudo_perplexity", "pseudo-perplexity", 1, 1, higher=False),
            Score("reused", "accuracy on sst2 of the encoder reused, %"),
        ),
        options={"max_length": 64, "packing": True},
        same="The same blocks, 15 % hidden; DataCollatorForLanguageModeling draws anew in each epoch, as ours does. "
        "The new transform before the output matrix trains on both sides, the output bias with ours alone.",
    ),
}


@dataclass(frozen=True)
class Run:
    """One measurement; all of it together is the key in the results file."""

    row: str
    side: str
    seed: int
    size: Size
    learning_rate: float
    batch_size: int
    strategy: str
    data: str

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> Run:
        """A run from plain data."""
        return cls(**{**plain, "size": Size(**plain["size"])})

    def __str__(self) -> str:
        size = f"{self.size.train:,} rows, {self.size.epochs} epochs"
        return f"{self.row}, {self.side}, {size}, learning rate {rate(self.learning_rate)}, seed {self.seed}"


@dataclass(frozen=True)
class Result:
    """What a run came to; floor and untrained are taken with ours alone, for they do not depend on the side."""

    run: Run
    rows: Size  # what there was
    floor: dict[str, float]  # the best answer that never looks at the input
    untrained: dict[str, float]
    trained: dict[str, float]
    train_seconds: float
    others_cores: float | None
    trained_parameters: int
    peak_bytes: int
    machine: str
    versions: str

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> Result:
        """A result from plain data."""
        return cls(**{**plain, "run": Run.parse(plain["run"]), "rows": Size(**plain["rows"])})
