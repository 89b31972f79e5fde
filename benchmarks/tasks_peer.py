"""The peer of the tasks' benchmark: peft under transformers' own Trainer, written as their examples write it.

Same backbone, rank, alpha, modules and training arguments as ours, texts of like length together; all else are
transformers' defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import transformers

from benchmarks.tasks_child import Parts, Side, prepared, settings
from benchmarks.tasks_rows import LLAMA, MINILM, VIT, Row, Run

if TYPE_CHECKING:
    from datasets import Dataset

# Every linear map of the blocks, no pooler and no head, which is what ours takes by default.
MODULES = {
    MINILM: r".*\.encoder\.layer\.\d+\..*\.(query|key|value|dense)",
    VIT: r".*\.layers\.\d+\..*\.([qkvo]_proj|fc1|fc2)",
    LLAMA: r".*\.layers\.\d+\..*\.([qkvo]_proj|gate_proj|up_proj|down_proj)",
}
BEST = 20  # starts and ends that are tried with each other, as in transformers' example for SQuAD
ANSWER_TOKENS = 30


def make(row: Row, run: Run, parts: Parts, model: str, folder: Path) -> Side:
    """The peer of one row."""
    transformers.set_seed(run.seed)
    return SIDES[row.task](row, run, parts, model, folder)


def wrapped(row: Row, model: Any, task_type: str | None, modules_to_save: list[str] | None = None) -> Any:
    """A model in peft's wrapper, or as it is where all of it trains."""
    if row.strategy == "full":
        return model
    config = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=MODULES[row.backbone],
        task_type=task_type,
        modules_to_save=modules_to_save,
    )
    return peft.get_peft_model(model, config)


def trainer(
    run: Run, folder: Path, model: Any, rows: Dataset, processor: Any, collator: Any = None
) -> transformers.Trainer:
    """transformers.Trainer; without a collator its own choice."""
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**settings(run, folder), **order(rows)),
        train_dataset=rows,
        processing_class=processor,
        data_collator=collator,
    )


def order(rows: Dataset) -> dict[str, Any]:
    """Texts of like length together, as ours takes them; the sampler asks for token ids."""
    return {"train_sampling_strategy": "group_by_length"} if "input_ids" in rows.column_names else {}


def predicted(made: transformers.Trainer, rows: Dataset, **options: Any) -> Any:
    """What the model says of the rows, in their order: transformers would group these by length as well."""
    made.args.train_sampling_strategy = "random"
    return made.predict(rows, **options).predictions


def mapped(rows: Dataset, act: Callable[[Mapping[str, Any]], Any]) -> Dataset:
    """Model inputs from rows, a batch at a time."""
    return rows.map(act, batched=True, remove_columns=rows.column_names)


# ---------------------------------------------------------------------- one function a task


def text_classification(row: Row, run: Run, parts: Parts, folder_of_model: str, folder: Path) -> Side:
    """AutoModelForSequenceClassification, padded by the Trainer's own collator."""
    labels = parts.labels or []
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of_model)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder_of_model, num_labels=len(labels))

    def inputs(batch: Mapping[str, Any]) -> Any:
        encoded = tokenizer(batch["text"], truncation=True, max_length=row.options["max_length"])
        return {**encoded, "labels": [labels.index(str(label)) for label in batch["label"]]}

    made = trainer(run, folder, wrapped(row, model, "SEQ_CLS"), mapped(parts.train, inputs), tokenizer)
    return Side(made, tokenizer, lambda: classes(made, mapped(parts.test, inputs), labels))


def classes(made: transformers.Trainer, rows: Dataset, labels: list[str]) -> list[str]:
    """The label of the highest logit, row by row."""
    return [labels[index] for index in predicted(made, rows).argmax(-1)]


def image_classification(row: Row, run: Run, parts: Parts, folder_of_model: str, folder: Path) -> Side:
    """AutoModelForImageClassification; pixels by its own processor, once."""
    labels = parts.labels or []
    kind: Any = transformers.AutoImageProcessor
    processor = kind.from_pretrained(folder_of_model, backend="pil")
    model = transformers.AutoModelForImageClassification.from_pretrained(folder_of_model, num_labels=len(labels))
    model.config.id2label = dict(enumerate(labels))

    def inputs(batch: Mapping[str, Any]) -> Any:
        pictures = [image.convert("RGB") for image in batch["image"]]
        pixels = processor(pictures, return_tensors="np")["pixel_values"]
        return {"pixel_values": pixels, "labels": [labels.index(name) for name in batch["name"]]}

    from benchmarks.tasks_child import label_names

    def ready(rows: Dataset) -> Dataset:
        plain = rows.add_column("name", label_names(rows))
        return mapped(plain, inputs).with_format("torch")

    wrap = wrapped(row, model, None, ["classifier"])
    made = trainer(run, folder, wrap, ready(parts.train), processor, transformers.default_data_collator)
    return Side(made, processor, lambda: classes(made, ready(parts.test), labels))


def token_classification(row: Row, run: Run, parts: Parts, folder_of_model: str, folder: Path) -> Side:
    """AutoModelForTokenClassification and DataCollatorForTokenClassification; a tag at a word's first token."""
    labels = parts.labels or []
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of_model)
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder_of_model, num_labels=len(labels))

    def inputs(batch: Mapping[str, Any]) -> Any:
        encoded = tokenizer(
            batch["tokens"], is_split_into_words=True, truncation=True, max_length=row.options["max_length"]
        )
        encoded["labels"] = [
            [
                -100 if word is None or word == before else labels.index(tags[word])
                for word, before in zip(words, [None, *words], strict=False)
            ]
            for tags, words in ((tags, encoded.word_ids(number)) for number, tags in enumerate(batch["tags"]))
        ]
        return encoded

    made = trainer(
        run,
        folder,
        wrapped(row, model, "TOKEN_CLS"),
        mapped(parts.train, inputs),
        tokenizer,
        transformers.DataCollatorForTokenClassification(tokenizer),
    )

    def answers() -> list[list[str]]:
        rows = mapped(parts.test, inputs)
        best = predicted(made, rows)
        given = []
        for tags, words, logits in zip(parts.test["tags"], rows["labels"], best.argmax(-1), strict=True):
            said = [labels[tag] for tag, label in zip(logits, words, strict=False) if label != -100]
            given.append(said + ["O"] * (len(tags) - len(said)))  # words that were cut off
        return given

    return Side(made, tokenizer, answers)


def question_answering(row: Row, run: Run, parts: Parts, folder_of_model: str, folder: Path) -> Side:
    """AutoModelForQuestionAnswering over windows; the best start and end as transformers' example chooses them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of_model)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder_of_model)

    def windows(batch: Mapping[str, Any]) -> Any:
        return tokenizer(
            batch["question"],
            batch["context"],
            truncation="only_second",
            max_length=row.options["max_length"],
            stride=row.options["stride"],
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )

    def inputs(batch: Mapping[str, Any]) -> Any:
        encoded = windows(batch)
        samples, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        starts, ends = [], []
        for number, sample in enumerate(samples):
            answer = batch["answers"][sample]
            begin = answer["answer_start"][0]
            stop = begin + len(answer["text"][0])
            inside = [place for place, part in enumerate(encoded.sequence_ids(number)) if part == 1]
            first = [place for place in inside if offsets[number][place][0] <= begin < offsets[number][place][1]]
            last = [place for place in inside if offsets[number][place][0] < stop <= offsets[number][place][1]]
            both = bool(first and last)
            starts.append(first[0] if both else 0)
            ends.append(last[0] if both else 0)
        return {**encoded, "start_positions": starts, "end_positions": ends}

    made = trainer(run, folder, wrapped(row, model, "QUESTION_ANS"), mapped(parts.train, inputs), tokenizer)

    def answers() -> list[str]:
        encoded = windows(parts.test[:])
        samples = encoded["overflow_to_sample_mapping"]
        from datasets import Dataset as Rows

        rows = Rows.from_dict({name: encoded[name] for name in ("input_ids", "attention_mask", "token_type_ids")})
        starts, ends = predicted(made, rows)
        best: dict[int, tuple[float, str]] = {}
        for number, sample in enumerate(samples):
            inside = {place for place, part in enumerate(encoded.sequence_ids(number)) if part == 1}
            offsets, context = encoded["offset_mapping"][number], parts.test[sample]["context"]
            for first in starts[number].argsort()[: -BEST - 1 : -1]:
                for last in ends[number].argsort()[: -BEST - 1 : -1]:
                    if first not in inside or last not in inside or not 0 <= last - first < ANSWER_TOKENS:
                        continue
                    value = float(starts[number][first] + ends[number][last])
                    if value > best.get(sample, (-float("inf"), ""))[0]:
                        best[sample] = value, context[offsets[first][0] : offsets[last][1]]
        return [best[sample][1] if sample in best else "" for sample in range(len(parts.test))]

    return Side(made, tokenizer, answers)


def seq2seq(row: Row, run: Run, parts: Parts, folder_of_model: str, folder: Path) -> Side:
    """Seq2SeqTrainer with DataCollatorForSeq2Seq, answers by its own generation."""
    options = row.options
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of_model)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder_of_model)

    def inputs(batch: Mapping[str, Any]) -> Any:
        return {
            **tokenizer(batch["source"], truncation=True, max_length=options["max_length"]),
            "labels": tokenizer(text_target=batch["target"], truncation=True, max_length=options["max_target_length"])[
                "input_ids"
            ],
        }

    rows = mapped(parts.train, inputs)
    made = transformers.Seq2SeqTrainer(
        model=model,
        args=transformers.Seq2SeqTrainingArguments(**settings(run, folder), **order(rows), predict_with_generate=True),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model),
    )

    def answers() -> list[str]:
        test = mapped(parts.test, inputs)
        found = predicted(made, test, max_new_tokens=options["max_new_tokens"], num_beams=1).copy()
        found[found < 0] = tokenizer.pad_token_id
        return list(tokenizer.batch_decode(found, skip_special_tokens=True))

    return Side(made, tokenizer, answers)


def causal_lm(row: Row, run: Run, parts: Parts, folder_of_model: str, folder: Path) -> Side:
    """AutoModelForCausalLM on the rows that ours gets; DataCollatorForSeq2Seq pads ids and labels of unpacked ones."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of_model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(folder_of_model)
    rows = prepared(row, parts.train, tokenizer, model)
    packed = "position_ids" in rows.column_names
    columns = ["input_ids", "labels", "position_ids" if packed else "attention_mask"]
    if not packed and "attention_mask" not in rows.column_names:
        rows = rows.add_column("attention_mask", [[1] * length for length in rows["length"]])
    collator: Any = (
        transformers.default_data_collator if packed else transformers.DataCollatorForSeq2Seq(tokenizer, model)
    )
    made = trainer(run, folder, wrapped(row, model, "CAUSAL_LM"), rows.select_columns(columns), tokenizer, collator)
    return Side(made, tokenizer, list)


def masked_lm(row: Row, run: Run, parts: Parts, folder_of_model: str, folder: Path) -> Side:
    """AutoModelForMaskedLM and DataCollatorForLanguageModeling on ours' blocks; the new transform trains."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of_model)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder_of_model)
    rows = prepared(row, parts.train, tokenizer, model).select_columns(["input_ids"])  # whole blocks
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    made = trainer(run, folder, wrapped(row, model, None, ["transform"]), rows, tokenizer, collator)
    return Side(made, tokenizer, list)


SIDES = {
    "text-classification": text_classification,
    "image-classification": image_classification,
    "token-classification": token_classification,
    "question-answering": question_answering,
    "seq2seq": seq2seq,
    "causal-lm": causal_lm,
    "masked-lm": masked_lm,
}
