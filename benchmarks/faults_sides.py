"""The two sides of the faults benchmark: the same small model, rows and settings under ours and under the plain stack.

Everything is made here: a BERT of two blocks with random weights, a tokenizer of words, sentences. A run is a forked
child of a parent that has imported everything once, so that it takes about a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, final

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import datasets
import torch
import transformers

torch.set_num_threads(1)  # a forked child has only the thread that forked

LABELS = ("billing", "delivery", "account")
WORDS = {
    "billing": ("refund", "charged", "twice", "invoice", "money"),
    "delivery": ("parcel", "late", "courier", "track", "lost"),
    "account": ("login", "password", "reset", "email", "locked"),
}
FILLER = ("please", "help", "my", "was", "the", "still", "again", "why", "is", "now")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SHARED = {  # of both sides
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 2,
    "save_strategy": "steps",
    "logging_steps": 1,
    "seed": 0,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["query", "value"]}


# ---------------------------------------------------------------------- what both sides get


def tokenizer() -> Any:
    """Words to ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    words = [*SPECIAL, *FILLER, *(word for each in WORDS.values() for word in each)]
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=24, **named)


def model(seed: int = 0) -> Any:
    """A BERT classifier of two blocks, with the same random weights for the same seed."""
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(config)


def rows(count: int = 24) -> list[dict[str, str]]:
    """Short sentences of different lengths, each with its label."""
    draw = random.Random(0)
    made = []
    for number in range(count):
        label = LABELS[number % len(LABELS)]
        words = draw.sample(FILLER, draw.randint(2, 6)) + draw.sample(WORDS[label], 2)
        draw.shuffle(words)
        made.append({"text": " ".join(words), "label": label})
    return made


# ---------------------------------------------------------------------- the sides


class Side(Protocol):
    """A library under test."""

    name: str

    def adapted(self) -> Any:
        """A fresh model with a LoRA adapter on it."""

    def trainer(self, adapted: Any, folder: Path, **settings: Any) -> Any:
        """A trainer of it that writes its checkpoints into a folder."""

    def state(self, adapted: Any) -> dict[str, Any]:
        """The trained tensors."""

    def module(self, adapted: Any) -> Any:
        """The torch module."""

    def save(self, adapted: Any, folder: Path) -> None:
        """Write the adapter folder."""

    def load(self, folder: Path) -> Any:
        """Open an adapter folder on a fresh backbone."""


@final
class Ours:
    """Holdfast."""

    name = "ours"

    def adapted(self) -> Any:
        import adapters

        torch.manual_seed(0)
        return adapters.adapt(model(), "lora", processor=tokenizer(), labels=list(LABELS), **LORA)

    def trainer(self, adapted: Any, folder: Path, **settings: Any) -> Any:
        import adapters

        return adapters.Trainer(adapted, {"output_dir": str(folder), **SHARED, **settings}, rows())

    def state(self, adapted: Any) -> dict[str, Any]:
        found: dict[str, Any] = adapted.state()
        return found

    def module(self, adapted: Any) -> Any:
        return adapted.model

    def save(self, adapted: Any, folder: Path) -> None:
        import adapters

        adapters.save(adapted, folder)

    def load(self, folder: Path) -> Any:
        import adapters

        return adapters.load(folder, model())


@final
class Plain:
    """peft and transformers.Trainer, used as their documentation says."""

    name = "peft + transformers.Trainer"

    def adapted(self) -> Any:
        import peft

        torch.manual_seed(0)
        return peft.get_peft_model(model(), peft.LoraConfig(task_type="SEQ_CLS", **LORA))

    def trainer(self, adapted: Any, folder: Path, **settings: Any) -> Any:
        words = tokenizer()
        encoded = [{**words(row["text"]), "labels": LABELS.index(row["label"])} for row in rows()]
        return transformers.Trainer(
            adapted,
            transformers.TrainingArguments(output_dir=str(folder), **{**SHARED, **settings}),
            data_collator=transformers.DataCollatorWithPadding(words),
            train_dataset=datasets.Dataset.from_list(encoded),
            processing_class=words,
        )

    def state(self, adapted: Any) -> dict[str, Any]:
        import peft

        found: dict[str, Any] = peft.get_peft_model_state_dict(adapted)
        return found

    def module(self, adapted: Any) -> Any:
        return adapted

    def save(self, adapted: Any, folder: Path) -> None:
        adapted.save_pretrained(folder)

    def load(self, folder: Path) -> Any:
        import peft

        return peft.PeftModel.from_pretrained(model(), str(folder))


OURS, PLAIN = Ours(), Plain()
SIDES: dict[str, Side] = {"ours": OURS, "plain": PLAIN}


# ---------------------------------------------------------------------- one run, in a child


@dataclass(frozen=True)
class Answer:
    """What a run came to; `fault` is empty where it ended well."""

    weights: str = ""  # digest of the trained tensors
    losses: str = ""  # digest of everything that was logged at each step
    began: int = -1  # the step that it went on from
    fault: str = ""
    clear: bool = False  # the error is one of ours
    said: tuple[str, ...] = ()  # warnings

    @classmethod
    def parse(cls, found: dict[str, Any]) -> Answer:
        """What a child wrote down."""
        return cls(**{**found, "said": tuple(found["said"])})

    def same(self, other: Answer) -> bool:
        """Bit for bit the same weights, the same losses."""
        return not self.fault and (self.weights, self.losses) == (other.weights, other.losses)


def digest(state: Mapping[str, Any]) -> str:
    """Of names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class _Start(transformers.TrainerCallback):
    """Tells when training begins, and from which step."""

    def __init__(self, ready: Callable[[], None]) -> None:
        self.ready, self.step = ready, -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step
        self.ready()


def train(side: Side, folder: Path, resume: bool, ready: Callable[[], None] = lambda: None, **settings: Any) -> Answer:
    """Train, from the start or on from the newest checkpoint; what was said goes into the answer."""
    adapted = side.adapted()
    trainer = side.trainer(adapted, folder, **settings)
    start = _Start(ready)
    trainer.add_callback(start)
    trainer.train(resume_from_checkpoint=True if resume else None)
    timed = {"tokens_per_second"}  # no two runs have it alike
    logged = [
        {name: value for name, value in entry.items() if name not in timed}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    losses = hashlib.sha256(json.dumps(logged, sort_keys=True).encode()).hexdigest()
    began = start.step if start.step >= 0 else trainer.state.global_step  # a finished run does not begin again
    return Answer(digest(side.state(adapted)), losses, began)


@final
class _Said(logging.Handler):
    """Keeps what is warned of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """Everything that is warned of or logged as a warning meanwhile."""
    said = _Said()
    loggers = [logging.getLogger(name) for name in ("adapters", "transformers", "peft")]
    for logger in loggers:
        logger.addHandler(said)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said.lines
            said.lines += [str(each.message) for each in caught]
    finally:
        for logger in loggers:
            logger.removeHandler(said)


def told(fault: BaseException) -> str:
    """An error on one line."""
    return f"{type(fault).__name__}: {' '.join(str(fault).split())[:300]}"


def answered(act: Callable[[], Answer]) -> Answer:
    """The answer of an act; where it fails, the error."""
    import adapters

    with listening() as said:
        try:
            answer = act()
        except Exception as fault:
            answer = Answer(fault=told(fault), clear=isinstance(fault, adapters.AdaptersError))
            traceback.print_exc()
    return replace(answer, said=tuple(line[:300] for line in said))


# ---------------------------------------------------------------------- a child


class Unanswered(RuntimeError):
    """A child ended without an answer."""


def child(act: Callable[[], Any], file: Path, seconds: int = 600) -> int:
    """Fork a process that writes what an act returns into a file, as JSON; what it prints goes beside it.

    Returns:
        The process id. The process ends itself after so many seconds.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    file.unlink(missing_ok=True)
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        signal.alarm(seconds)
        log = os.open(file.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        file.write_text(json.dumps(act()))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(status)


def answer_of(file: Path) -> Any:
    """What a child wrote.

    Raises:
        Unanswered: it wrote nothing.
    """
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as fault:
        said = file.with_suffix(".log").read_text(errors="replace")[-2000:]
        raise Unanswered(f"a run ended without an answer; the last it said:\n{said}") from fault


def in_child(act: Callable[[], Any], place: Path) -> Any:
    """What an act returns in a child of its own, waited for."""
    file = place / "answer.json"
    os.waitpid(child(act, file), 0)
    return answer_of(file)


def run(side: Side, folder: Path, resume: bool, **settings: Any) -> Answer:
    """One run in a child, to its end."""
    found = in_child(lambda: vars(answered(lambda: train(side, folder, resume, **settings))), folder.parent)
    return Answer.parse(found)
