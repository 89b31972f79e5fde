"""One run of the tasks' benchmark in a process of its own: rows in, numbers out (`benchmarks.tasks` starts it)."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import machine, peak_memory, serve, timed, versions
from benchmarks.tasks_rows import EMBEDDED, LLAMA, MINILM, OURS, PEER, ROWS, SHARED, T5, VIT, Result, Row, Run, Size

if TYPE_CHECKING:
    import transformers
    from datasets import Dataset

DATA_SEED = 0  # which rows: the same for every run, so that the spread over seeds is the training's alone
VOCABULARY = 4000  # of the translation tokenizer
REUSED = Size(300, 400, 3)  # sst2 rows for the encoder that read on
SENTENCE = re.compile(r"(?<= \.) ")  # wikitext's full stops stand alone


@dataclass(frozen=True)
class Parts:
    """The raw rows of a run, in the task's columns, and the label names of the whole training file."""

    train: Dataset
    test: Dataset
    labels: list[str] | None


@dataclass(frozen=True)
class Side:
    """What both sides hand over: a trainer that is ready, and how its model answers the test rows."""

    trainer: transformers.Trainer
    processor: Any
    answers: Callable[[], list[Any]]  # labels, tags, texts; not asked of language models


# ---------------------------------------------------------------------- rows


def draw(row: Row, data: str, size: Size) -> Parts:
    """The first rows of a seeded shuffle; where there is no test split, the last tenth of the file in its order."""
    from datasets import Dataset

    import adapters.data
    import adapters.quickstart

    if data == EMBEDDED:
        splits = adapters.data.read(adapters.quickstart.rows())
    elif row.task == "masked-lm":
        folder = SHARED / "data" / data
        splits = {
            part: Dataset.from_dict({"text": texts(Path(folder / f"wikitext-2-{file}.txt"))})
            for part, file in (("train", "valid"), ("test", "test"))
        }
        short = [sentence for text in splits["test"]["text"] for sentence in SENTENCE.split(text)]
        splits["test"] = Dataset.from_dict(
            {"text": [text for text in short if 8 <= len(text.split()) <= 24 and "[UNK]" not in text]}
        )
    else:
        splits = adapters.data.read(str(SHARED / "data" / data))
    if "test" not in splits:
        whole = splits["train"]
        border = len(whole) * 9 // 10
        splits = {"train": whole.select(range(border)), "test": whole.select(range(border, len(whole)))}
    splits = {
        name: rows.rename_columns({source: column for column, source in row.columns.items()})
        for name, rows in splits.items()
    }
    return Parts(
        shuffled(splits["train"], size.train), shuffled(splits["test"], size.test), labels_of(row, splits["train"])
    )


def shuffled(rows: Dataset, most: int) -> Dataset:
    """The first rows of a seeded shuffle."""
    order = list(range(len(rows)))
    random.Random(DATA_SEED).shuffle(order)
    return rows.select(order[:most])


def texts(file: Path) -> list[str]:
    """Wikitext's paragraphs without its headings; its mark for a rare word is the tokenizer's."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line.replace("<unk>", "[UNK]") for line in lines if len(line.split()) > 8 and not line.startswith("= ")]


def labels_of(row: Row, rows: Dataset) -> list[str] | None:
    """The label names of the whole training file."""
    if row.task == "token-classification":
        found = {tag for tags in rows["tags"] for tag in tags}
        return ["O", *sorted(found - {"O"})]
    if "label" not in rows.column_names:
        return None
    feature = rows.features["label"]
    names = list(getattr(feature, "names", None) or sorted(set(rows["label"])))
    return [str(name) for name in names]


# ---------------------------------------------------------------------- backbones


def backbone(row: Row, parts: Parts, folder: Path) -> str:
    """The folder of a backbone."""
    from adapters.quickstart import backbone as minilm

    if row.backbone == MINILM:
        return minilm()
    if row.backbone in (VIT, LLAMA):
        return str(SHARED / "models" / row.backbone)
    assert row.backbone == T5
    return small_t5(parts, folder / "t5")


def small_t5(parts: Parts, folder: Path) -> str:
    """A T5 of 2 + 2 layers, 128 wide, with random weights, and a tokenizer trained on the training rows."""
    import tokenizers
    import transformers

    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    learner = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False
    )
    made.train_from_iterator([*parts.train["source"], *parts.train["target"]], learner)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", made.token_to_id("</s>"))]
    )
    tokenizer: Any = transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=128
    )
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.1,
        decoder_start_token_id=0,  # type: ignore[call-arg]
        pad_token_id=0,
        eos_token_id=1,
    )
    transformers.set_seed(DATA_SEED)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---------------------------------------------------------------------- ours


def settings(run: Run, folder: Path) -> dict[str, Any]:
    """The training arguments that both sides get; all else is each side's default."""
    return {
        "output_dir": str(folder / "run"),
        "learning_rate": run.learning_rate,
        "num_train_epochs": run.size.epochs,
        "per_device_train_batch_size": run.batch_size,
        "per_device_eval_batch_size": 32,
        "warmup_steps": 0.06,  # below 1: a share of all steps
        "weight_decay": 0.01,
        "adam_beta2": 0.999,  # LoRA's own default is another
        "seed": run.seed,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }


def ours(row: Row, run: Run, parts: Parts, model: str, folder: Path) -> Side:
    """The library; all that is not given is the strategy's default."""
    import adapters

    adapted = adapters.adapt(
        model, row.strategy, task=row.task, seed=run.seed, **named_labels(parts), **dict(row.options)
    )
    trainer = adapters.Trainer(
        adapted,
        settings(run, folder),
        prepared(row, parts.train, adapted.processor, adapted.model) if language(row) else parts.train,
    )

    def answers() -> list[Any]:
        asked = parts.test.remove_columns([c for c in parts.test.column_names if c in TRUTH])
        found = adapters.predict(adapted, asked)
        best = [answer[0] if isinstance(answer, list) else answer for answer in found]  # of pictures the best five come
        return [answer[ANSWER[row.task]] for answer in best]

    return Side(trainer, adapted.processor, answers)


TRUTH = ("label", "tags", "answers", "target")
ANSWER = {
    "text-classification": "label",
    "image-classification": "label",
    "token-classification": "tags",
    "question-answering": "answer",
    "seq2seq": "translation_text",
}


def named_labels(parts: Parts) -> dict[str, Any]:
    """The labels as an option, where the task has some."""
    return {} if parts.labels is None else {"labels": parts.labels}


def language(row: Row) -> bool:
    """Whether the row is measured by likelihood, and both sides get rows that were prepared once."""
    return row.task in ("causal-lm", "masked-lm")


def prepared(row: Row, rows: Dataset, processor: Any, model: Any, *, train: bool = True) -> Dataset:
    """Token ids by the task: of packed rows to train on only whole blocks, which the peer's batches need."""
    from adapters.tasks import TASKS

    made, _ = TASKS[row.task](**dict(row.options)).prepare(rows, processor, model, labelled=True)
    longest = max(made["length"])
    packed = "text" in rows.column_names
    return made.filter(lambda each: each["length"] == longest) if train and packed else made


# ---------------------------------------------------------------------- numbers


def score(row: Row, side: Side, parts: Parts) -> dict[str, float]:
    """The row's numbers over the test rows; the same lines for both sides."""
    model: Any = side.trainer.model
    model.eval()
    if row.task == "masked-lm":
        from adapters.cloze import pseudo_perplexity

        return pseudo_perplexity(model, side.processor, list(parts.test["text"]))
    if row.task == "causal-lm":
        return likelihood(model, prepared(row, parts.test, side.processor, model, train=False))
    return measured(row, side.answers(), parts)


def measured(row: Row, given: Sequence[Any], parts: Parts) -> dict[str, float]:
    """Numbers of answers."""
    from adapters import metrics

    if row.task == "seq2seq":
        return metrics.translation(list(given), list(parts.test["target"]))
    if row.task == "question-answering":
        found: dict[str, float] = metrics.answers(given, [cell["text"] for cell in parts.test["answers"]])
        return found
    if row.task == "token-classification":
        words = [list(tags) for tags in parts.test["tags"]]
        filled = [[tag or "O" for tag in tags] for tags in given]
        hits = [
            one == other
            for left, right in zip(filled, words, strict=True)
            for one, other in zip(left, right, strict=True)
        ]
        numbers: dict[str, float] = metrics.entities(filled, words)
        return {**numbers, "accuracy": sum(hits) / len(hits)}
    truth = label_names(parts.test)
    return {"accuracy": sum(one == other for one, other in zip(given, truth, strict=True)) / len(truth)}


def label_names(rows: Dataset) -> list[str]:
    """The labels of rows, by name."""
    names = getattr(rows.features["label"], "names", None)
    return [names[label] if names else str(label) for label in rows["label"]]


def likelihood(model: Any, rows: Dataset) -> dict[str, float]:
    """Loss in nats a learnt token and perplexity, a row at a time: nothing padded, nothing of either side's batches."""
    import math

    import torch

    nats, learnt = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "position_ids") if name in row}
            logits = model(**inputs, use_cache=False).logits[0, :-1].float()
            labels = torch.tensor(row["labels"][1:])
            nats += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100))
            learnt += int((labels != -100).sum())
    return {"loss": nats / learnt, "perplexity": math.exp(nats / learnt)}


def floor(row: Row, side: Side, parts: Parts) -> dict[str, float]:
    """The best answer that never looks at the input, as the task knows it."""
    adapted = side.trainer.adapted  # type: ignore[attr-defined]
    task = adapted.record.task or adapted.task
    train, test = (
        task.prepare(rows, adapted.processor, adapted.model, labelled=True)[0] for rows in (parts.train, parts.test)
    )
    found: dict[str, float] = task.baseline(train, test, adapted.processor)
    if row.task == "masked-lm":
        found["pseudo_perplexity"] = found["perplexity"]
    return found


# ---------------------------------------------------------------------- an encoder that read on


def reused(encoder: Any | None, folder: Path) -> float:
    """Accuracy on sst2 of MiniLM with LoRA on a few hundred rows; its encoder's weights, or those given.

    Args:
        encoder: a BertModel that read on; None for MiniLM as it is. It has no pooler, which stays MiniLM's.
    """
    import transformers

    from adapters.quickstart import backbone as minilm

    row = ROWS["sst2"]
    model = transformers.AutoModel.from_pretrained(minilm())
    if encoder is not None:
        left = model.load_state_dict(encoder.state_dict(), strict=False)
        assert not left.unexpected_keys, left
        assert all("pooler" in key for key in left.missing_keys), left
    model.save_pretrained(folder / "encoder")
    transformers.AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder / "encoder")
    parts = draw(row, row.data, REUSED)
    run = Run("sst2", OURS, 0, REUSED, row.learning_rate, row.batch_size, row.strategy, row.data)
    side = ours(row, run, parts, str(folder / "encoder"), folder)
    side.trainer.train()
    return measured(row, side.answers(), parts)["accuracy"]


def encoder_of(side: Side, run: Run) -> Any:
    """The encoder with what was learnt merged into it."""
    import adapters

    if run.side == PEER:
        model: Any = side.trainer.model
        return model.merge_and_unload().bert
    merged: Any = adapters.merge(side.trainer.adapted)  # type: ignore[attr-defined]
    return merged.bert


# ---------------------------------------------------------------------- a run


def measure(run: Run, folder: Path) -> Result:
    """One run, from rows to numbers."""
    from benchmarks import tasks_peer

    row = ROWS[run.row]
    parts = draw(row, run.data, run.size)
    model = backbone(row, parts, folder)
    side = (tasks_peer.make if run.side == PEER else ours)(row, run, parts, model, folder)
    none: dict[str, float] = {}
    blind, before = (floor(row, side, parts), score(row, side, parts)) if run.side == OURS else (none, none)
    took = timed(side.trainer)
    after = score(row, side, parts)
    adapted: Any = side.trainer.model
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    peak = peak_memory()
    if row.task == "masked-lm":
        after["reused"] = reused(encoder_of(side, run), folder)
        if run.side == OURS:
            before["reused"] = reused(None, folder)
    keys = {entry.key for entry in row.scores}
    return Result(
        run=run,
        rows=Size(len(parts.train), len(parts.test), run.size.epochs),
        floor={key: value for key, value in blind.items() if key in keys},
        untrained={key: value for key, value in before.items() if key in keys},
        trained={key: value for key, value in after.items() if key in keys},
        train_seconds=took.seconds,
        others_cores=took.others_cores,
        trained_parameters=trained,
        peak_bytes=peak,
        machine=machine(str(side.trainer.args.device)),
        versions=versions(),
    )


def answer(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The child's work."""
    return asdict(measure(Run.parse(request["run"]), folder))


if __name__ == "__main__":
    serve(answer)
