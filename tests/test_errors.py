"""Bad input through the functions: the right exception, what, where and the remedy, and nothing changed or left."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset

import adapters
from adapters import data, errors
from adapters.errors import (
    AdaptersError,
    BackboneError,
    ContractError,
    DataError,
    DiskError,
    FolderError,
    MissingPackageError,
    NumbersError,
    RankError,
    RequestError,
    SpentError,
)

LABELS = ["a", "b", "c"]


def adapted_on(kind: str = "bert", strategy: Any = "lora", **options: Any) -> adapters.Adapted:
    return adapters.adapt(tiny.model(kind), strategy, labels=LABELS, processor=tiny.tokenizer(), **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.folder("bert", tmp_path_factory.mktemp("base") / "bert")


@pytest.fixture(scope="module")
def saved(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    adapted = adapters.adapt(base, "lora", labels=LABELS)
    tiny.shake(adapted)
    return adapters.save(adapted, tmp_path_factory.mktemp("saved") / "adapter")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def refused(kind: type[AdaptersError], call: Callable[[], object], *said: str) -> str:
    """The message of an error of exactly this kind, in one line, that says all of these."""
    with pytest.raises(AdaptersError) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert "\n" not in text
    for words in said:
        assert words in text, f"{words!r} is not in: {text}"
    return text


# ---------------------------------------------------------------------- the tree


@pytest.mark.parametrize(
    ("kind", "also", "code"),
    [
        (RequestError, ValueError, 2),
        (DataError, ValueError, 3),
        (DiskError, OSError, 2),
        (FolderError, ValueError, 2),
        (BackboneError, ValueError, 2),
        (NumbersError, RuntimeError, 4),
        (ContractError, RuntimeError, 4),
        (RankError, RuntimeError, 2),
        (SpentError, RuntimeError, 2),
        (MissingPackageError, ImportError, 2),
    ],
)
def test_every_error_is_ours_and_python_s_with_its_exit_code(
    kind: type[AdaptersError], also: type[Exception], code: int
) -> None:
    assert issubclass(kind, AdaptersError)
    assert issubclass(kind, also)
    assert kind.exit_code == code
    assert getattr(adapters, kind.__name__) is kind


def test_a_message_has_one_form() -> None:
    assert errors.message("a fault") == "a fault"
    assert errors.message("a fault", where="file") == "a fault (file)"
    assert errors.message("a fault", expected=3, found=0) == "a fault; expected 3; found 0"
    full = errors.message("a fault", where="file", expected="text", found="5", remedy="Fix it.")
    assert full == "a fault (file); expected text; found 5. Fix it."


def test_the_nearest_name_is_offered_and_all_are_listed() -> None:
    assert errors.nearest("loraa", ["probe", "lora"]) == "Did you mean 'lora'? Known: lora, probe."
    assert errors.nearest("zzz", ["probe", "lora"]) == "Known: lora, probe."


# ---------------------------------------------------------------------- requests on a live model

REQUESTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown strategy": ({"strategy": "loraa"}, ("unknown strategy 'loraa'", "Did you mean 'lora'", "freeze, full")),
    "no strategy": ({"strategy": 5}, ("not a strategy", "a peft config", "int")),
    "unknown task": ({"task": "text-clasification"}, ("unknown task", "Did you mean 'text-classification'")),
    "no task": ({"task": 5, "labels": None}, ("task", "int")),
    "alias": ({"lora_r": 4}, ("unknown option 'lora_r'", "The name here is 'r'")),
    "alias of quantization": ({"load_in_4bit": True}, ("'load_in_4bit'", "quantization='nf4'")),
    "misspelt option": ({"lora_alpa": 4}, ("unknown option 'lora_alpa'", "Did you mean 'lora_alpha'", "'lora'")),
    "two unknown options": ({"lora_r": 4, "lora_alpa": 4}, ("'lora_r'", "'r'", "'lora_alpa'", "'lora_alpha'")),
    "option of another strategy": ({"strategy": "probe", "r": 4}, ("unknown option 'r'", "strategy 'probe'")),
    "target": ({"target_modules": ["qurey"]}, ("'qurey'", "target_modules", "Did you mean 'query'")),
    "one target of two": ({"target_modules": ["query", "valeu"]}, ("'valeu'", "Did you mean 'value'")),
    "target expression": ({"target_modules": "zz.*"}, ("'zz.*'", "target_modules")),
    "broken expression": ({"target_modules": "(query"}, ("'(query'", "regular expression")),
    "no targets": ({"target_modules": []}, ("target_modules",)),
    "head as target": ({"target_modules": ["classifier"]}, ("'classifier'", "head", "always trains")),
    "exclusion": ({"exclude_modules": ["zz"]}, ("'zz'", "exclude_modules")),
    "nothing left": ({"target_modules": ["query"], "exclude_modules": ["query"]}, ("nothing is left",)),
    "rank pattern": ({"rank_pattern": {"zz": 4}}, ("'zz'", "rank_pattern", "query")),
    "alpha pattern": ({"alpha_pattern": {"zz": 4}}, ("'zz'", "alpha_pattern")),
    "broken rank pattern": ({"rank_pattern": {"(": 4}}, ("'('", "rank_pattern")),
    "rank pattern of zero": ({"rank_pattern": {"query": 0}}, ("0",)),
    "block": ({"layers_to_transform": [0, 7]}, ("no block 7", "layers_to_transform", "0 to 2")),
    "block below zero": ({"layers_to_transform": [-1]}, ("no block -1", "0 to 2")),
    "no blocks": ({"layers_to_transform": []}, ("layers_to_transform",)),
    "rank": ({"r": 0}, ("(r)", "> 0", "0")),
    "several values": ({"r": -1, "lora_alpha": 0, "lora_dropout": 2}, ("(r)", "(lora_alpha)", "(lora_dropout)")),
    "bias": ({"bias": "some"}, ("bias", "lora_only", "'some'")),
    "initialisation": ({"init_lora_weights": "pisa"}, ("init_lora_weights", '"pissa"', "'pisa'")),
    "initialisation from rows": ({"init_lora_weights": "eva"}, ("init_lora_weights", "'eva'", "activations of rows")),
    "word for a switch": ({"use_rslora": "no"}, ("use_rslora", "'no'")),
    "word for another switch": ({"use_dora": "false"}, ("use_dora", "'false'")),
    "modules to save": ({"modules_to_save": ["pooler"]}, ("modules_to_save",)),
    "resolved modules": ({"modules": {"x": [1, 1, False, False]}}, ("modules",)),
    "freeze pattern": ({"strategy": "freeze", "pattern": "zzz"}, ("'zzz'", "pattern", "finds nothing")),
    "broken freeze pattern": ({"strategy": "freeze", "pattern": "("}, ("'('", "regular expression")),
    "one freeze pattern of two": ({"strategy": "freeze", "pattern": ["layer.2", "zzz"]}, ("'zzz'",)),
    "no freeze pattern": ({"strategy": "freeze", "pattern": []}, ("pattern",)),
    "freeze blocks": ({"strategy": "freeze", "layers": 4}, ("layers", "1 to 3", "4")),
    "freeze no blocks": ({"strategy": "freeze", "layers": 0}, ("layers", "1 to all of them", "0")),
    "freeze both": ({"strategy": "freeze", "layers": 1, "pattern": "layer.2"}, ("exclude each other",)),
    "peft without a method": ({"strategy": "peft"}, ("peft_type",)),
    "unknown peft method": ({"strategy": "peft", "config": {"peft_type": "IA4"}}, ("'IA4'", "IA3")),
    "unknown peft option": ({"strategy": "peft", "config": {"peft_type": "IA3", "nope": 1}}, ("nope", "IA3")),
    "quantization": ({"quantization": "nf5"}, ("unknown quantization 'nf5'", "fp4, nf4")),
    "nothing to pack": ({"strategy": "full", "quantization": "nf4"}, ("nothing to pack", "nf4")),
    "too few labels": ({"labels": ["a", "b"]}, ("another size", "2 outputs", "3", "num_labels=2")),
    "label twice": ({"labels": ["a", "a", "b"]}, ("label twice", "'a'")),
    "text for labels": ({"labels": "abc"}, ("one text instead of names",)),
    "number for labels": ({"labels": 3}, ("labels",)),
    "problem": ({"problem": "multilabel"}, ("unknown problem 'multilabel'", "Did you mean 'multi-label'")),
}


def snapshot(model: Any) -> tuple[Any, ...]:
    return (
        [id(module) for module in model.modules()],
        [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()],
        model.config.to_dict(),
        sorted(vars(model)),
        model.training,
    )


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_that_cannot_be_leaves_the_model_as_it_was(name: str) -> None:
    options, said = REQUESTS[name]
    model = tiny.model("bert")
    before, state = snapshot(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    refused(RequestError, lambda: adapters.adapt(model, **{"labels": ["x", "y", "z"], **options}), *said)
    assert snapshot(model) == before
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    adapters.adapt(model)  # and it can still be adapted


def test_a_fault_after_the_checks_leaves_tokenizer_and_config_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.model("gpt2"), tiny.tokenizer()
    model.config.pad_token_id = None
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side = None, "[SEP]", "left"
    before = snapshot(model)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(MissingPackageError, match="bitsandbytes"):
            adapters.adapt(model, "qlora", labels=["x", "y", "z"], processor=tokenizer)
    assert snapshot(model) == before
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "left")
    adapted = adapters.adapt(model, "qlora", labels=["x", "y", "z"], processor=tokenizer)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("[SEP]", "right")
    assert model.config.pad_token_id == 3
    assert adapted.record.config == {"pad_token_id": 3}
    assert any("no padding token" in note for note in adapted.record.notes)


@pytest.mark.parametrize(
    ("kind", "strategy", "said"), [("llama", "bitfit", "no biases"), ("albert", "freeze", "share one set of weights")]
)
def test_a_strategy_that_does_not_fit_the_backbone_is_refused(kind: str, strategy: str, said: str) -> None:
    refused(RequestError, lambda: adapted_on(kind, strategy), said, f"strategy '{strategy}'", "Take 'lora'")


def test_a_model_cannot_be_adapted_twice() -> None:
    adapted = adapted_on()
    refused(RequestError, lambda: adapters.adapt(adapted.model), "carries an adapter already", "adapters.merge")


def test_what_is_no_model_is_refused() -> None:
    refused(RequestError, lambda: adapters.adapt(torch.nn.Linear(2, 2)), "not a model", "Linear")
    refused(RequestError, lambda: adapters.adapt(tiny.backbone("bert")), "no task is known for BertModel")


def test_half_precision_that_overflows_is_not_trained() -> None:
    model = tiny.model("bert", dtype=torch.float16)
    refused(RequestError, lambda: adapters.adapt(model, "full"), "fp16", "bfloat16")
    assert not any(module.__class__.__module__.startswith("peft") for module in model.modules())


def test_labels_that_are_not_given_are_asked_for(base: str) -> None:
    refused(RequestError, lambda: adapters.adapt(base), "labels are not given", "labels=[", "problem='regression'")


def test_a_spent_adapter_says_so_everywhere(tmp_path: Path) -> None:
    adapted = adapted_on()
    adapters.merge(adapted)
    args = {"output_dir": str(tmp_path / "run")}
    refused(SpentError, lambda: adapters.merge(adapted), "merged")
    refused(SpentError, lambda: adapters.save(adapted, tmp_path / "out"), "merged")
    refused(SpentError, lambda: adapters.Trainer(adapted, args, tiny.rows(6)), "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_size_that_cannot_be_is_refused(size: Any) -> None:
    adapted = adapted_on(strategy="probe")
    refused(RequestError, lambda: adapters.predict(adapted, ["the parcel"], batch_size=size), "batch_size")
    refused(RequestError, lambda: adapters.evaluate(adapted, tiny.rows(3), batch_size=size), "batch_size")


# ---------------------------------------------------------------------- training settings


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("batch_size", "per_device_train_batch_size"),
        ("micro_batch_size", "per_device_train_batch_size"),
        ("lr", "learning_rate"),
        ("epochs", "num_train_epochs"),
        ("evaluation_strategy", "eval_strategy"),
        ("lr_scheduler", "lr_scheduler_type"),
        ("group_by_length", "train_sampling_strategy"),
        ("learning_rte", "learning_rate"),
        ("num_train_epoch", "num_train_epochs"),
    ],
)
def test_an_unknown_training_setting_is_refused_with_the_right_name(wrong: str, right: str, tmp_path: Path) -> None:
    adapted = adapted_on(strategy="probe")
    refused(RequestError, lambda: adapters.Trainer(adapted, {wrong: 1}, tiny.rows(6)), f"'{wrong}'", right)


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ({"label_smoothing_factor": 0.1}, "own option label_smoothing"),
        ({"push_to_hub": True}, "upload_folder"),
        ({"hub_model_id": "me/mine"}, "upload_folder"),
        ({"resume_from_checkpoint": "run/checkpoint-3"}, "trainer.train(resume_from_checkpoint=...)"),
        ({"auto_find_batch_size": True}, "per_device_train_batch_size"),
        ({"label_names": ["answers"]}, "The task names the labels"),
        ({"length_column_name": "words"}, "'length'"),
        ({"dataloader_drop_last": True}, "Every row"),
        ({"enable_jit_checkpoint": True}, "save_steps"),
        ({"bf16_full_eval": True, "use_cpu": True}, "dtype"),
        ({"batch_eval_metrics": True}, "compute_metrics of your own"),
        ({"eval_do_concat_batches": False}, "compute_metrics of your own"),
        ({"include_for_metrics": ["inputs"]}, "compute_metrics of your own"),
        ({"neftune_noise_alpha": 5.0}, "frozen_dropout=True"),
        ({"train_sampling_strategy": "shuffled"}, "group_by_length"),
        ({"report_to": "paper"}, "installed"),
        ({"eval_steps": 5, "eval_strategy": "epoch"}, "eval_strategy 'epoch'"),
        ({"save_steps": 5, "eval_strategy": "epoch", "save_strategy": "epoch"}, "save_strategy 'epoch'"),
        ({"fsdp": "full_shard"}, "FSDP divides"),
    ],
    ids=str,
)
def test_a_setting_that_would_do_nothing_is_refused_as_a_dict_and_as_an_object(
    given: dict[str, Any], right: str, tmp_path: Path
) -> None:
    from transformers import TrainingArguments

    adapted = adapted_on(strategy="probe")
    for args in ({"output_dir": str(tmp_path), **given}, TrainingArguments(output_dir=str(tmp_path), **given)):
        refused(
            RequestError,
            lambda args=args: adapters.Trainer(adapted, args, tiny.rows(6), tiny.rows(6, seed=1)),
            next(iter(given)),
            right,
        )
    assert adapted.record.settings == {}


@pytest.mark.parametrize(
    ("given", "evaluated", "right"),
    [
        ({"load_best_model_at_end": False}, True, "The best weights are put back"),
        ({"remove_unused_columns": True}, True, "The task chooses"),
        ({"logging_nan_inf_filter": True}, True, "not finite"),
        ({"load_best_model_at_end": True}, False, "Give an eval_dataset"),
        ({"eval_strategy": "epoch"}, False, "Give an eval_dataset"),
        ({"eval_steps": 5}, False, "Give an eval_dataset"),
        ({"load_best_model_at_end": True, "eval_strategy": "no"}, True, "never evaluated"),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, True, "never evaluated"),
        ({"greater_is_better": False}, True, "metric_for_best_model"),
    ],
    ids=str,
)
def test_a_dict_that_asks_for_what_is_not_done_is_refused(
    given: dict[str, Any], evaluated: bool, right: str, tmp_path: Path
) -> None:
    adapted = adapted_on(strategy="probe")
    rows = tiny.rows(6, seed=1) if evaluated else None
    args = {"output_dir": str(tmp_path), **given}
    refused(RequestError, lambda: adapters.Trainer(adapted, args, tiny.rows(6), rows), next(iter(given)), right)


def test_a_metric_that_is_not_there_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    args = {"output_dir": str(tmp_path), "metric_for_best_model": "acuracy", "num_train_epochs": 1}
    trainer = adapters.Trainer(adapted_on(strategy="probe"), args, tiny.rows(6), tiny.rows(6, seed=1))
    refused(RequestError, trainer.train, "acuracy", "Did you mean 'accuracy'")


@pytest.mark.parametrize("given", [5, "fast", ["learning_rate"]])
def test_training_settings_of_another_kind_are_refused(given: Any) -> None:
    adapted = adapted_on(strategy="probe")
    refused(RequestError, lambda: adapters.Trainer(adapted, given, tiny.rows(6)), type(given).__name__)


# ---------------------------------------------------------------------- rows from files

LATIN = "text,label\nhello,a\ncafé,b\n".encode("latin-1")
ZIPPED = gzip.compress(b"text,label\n" + b"".join(b"row %d,a\n" % number for number in range(500)))
ZIPPED_LINES = gzip.compress(b"".join(b'{"text": "row %d", "label": "a"}\n' % number for number in range(500)))


def damaged(content: bytes) -> bytes:
    return content[:60] + bytes([content[60] ^ 0xFF]) + content[61:]


FILES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "empty file": ("rows.csv", b"", ("empty", "0 bytes")),
    "only blank lines": ("rows.csv", b"\n\n  \n", ("rows.csv",)),
    "only a header": ("rows.csv", b"text,label\n", ("empty", "0 rows")),
    "no lines": ("rows.jsonl", b"\n\n", ("empty", "0 rows")),
    "empty list": ("rows.json", b"[]", ("empty", "0 rows")),
    "semicolons": ("rows.csv", b"text;label\nhello, you;a\n", ("'text;label'", "','", ".tsv")),
    "tabs in csv": ("rows.csv", b"text\tlabel\nhello\ta\n", ("text\\tlabel", ".tsv")),
    "commas in tsv": ("rows.tsv", b"text,label\nhello,a\n", ("'text,label'",)),
    "a field too many": ("rows.csv", b"text,label\none,a\ntwo,b,c\nthree,a\n", ("line 3", "2 fields", "saw 3")),
    "a field too many in every row": ("rows.csv", b"text,label\none,a,x\ntwo,b,y\n", ("line 2",)),
    "a field too many in the first row": ("rows.csv", b"text,label\none,a,x\ntwo,b\n", ("line 2",)),
    "a field too few": ("rows.csv", b"text,label\none,a\ntwo\nthree,b\n", ("line 3",)),
    "a name twice": ("rows.csv", b"text,label,text\none,a,two\n", ("'text'",)),
    "an open quote": ("rows.csv", b'text,label\n"one,a\ntwo,b\n', ("row 1",)),
    "latin-1": ("rows.csv", LATIN, ("utf-8", "0xe9")),
    "latin-1 lines": ("rows.jsonl", b'{"text": "caf\xe9", "label": "a"}\n', ("utf-8", "0xe9")),
    "a truncated archive": ("rows.csv.gz", ZIPPED[:-20], ("rows.csv.gz",)),
    "a damaged archive": ("rows.csv.gz", damaged(ZIPPED), ("rows.csv.gz",)),
    "no archive": ("rows.csv.gz", b"text,label\nhello,a\n", ("rows.csv.gz",)),
    "a truncated archive of lines": ("rows.jsonl.gz", ZIPPED_LINES[:-20], ("rows.jsonl.gz",)),
    "a damaged archive of lines": ("rows.jsonl.gz", damaged(ZIPPED_LINES), ("rows.jsonl.gz",)),
    "no archive of lines": ("rows.jsonl.gz", b'{"text": "a"}\n', ("rows.jsonl.gz",)),
    "a broken line": ("rows.jsonl", b'{"text": "a", "label": "x"}\n\n{"text": "b"\n', ("broken JSON", "line 3")),
    "a line that is text": ("rows.jsonl", b'{"text": "a"}\n"b"\n', ("no record", "row 1", "str")),
    "a list that is broken": ("rows.json", b'[{"text": "a"},\n', ("broken JSON",)),
    "a list of numbers": ("rows.json", b"[1, 2]", ("no record", "row 0", "int")),
    "no list": ("rows.json", b'{\n "text": "a"\n}\n', ("broken JSON",)),
    "a misspelt key": (
        "rows.jsonl",
        b'{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n{"text": "c", "lable": "x"}\n',
        ("other columns", "row 2", "label", "lable", "spelling"),
    ),
    "a key too few": (
        "rows.jsonl",
        b'{"text": "a", "label": "x"}\n{"text": "b"}\n{"text": "c", "label": "x"}\n',
        ("row 1", "label"),
    ),
    "mixed kinds": (
        "rows.jsonl",
        b'{"text": "a", "label": "x"}\n{"text": "b", "label": 1}\n{"text": "c", "label": "x"}\n',
        ("mixed kinds", "row 1", "'label'", "int: 1"),
    ),
    "text and list": (
        "rows.jsonl",
        b'{"text": "a", "label": ["x"]}\n{"text": "b", "label": ["x"]}\n{"text": "c", "label": "x"}\n',
        ("mixed kinds", "row 2", "'label'", "expected list"),
    ),
    "mixed lists": ("rows.jsonl", b'{"text": "a", "label": ["x"]}\n{"text": "b", "label": [1]}\n', ("rows.jsonl",)),
    "a number too large": ("rows.jsonl", b'{"text": "a", "label": 1180591620717411303424}\n', ("rows.jsonl",)),
    "no parquet": ("rows.parquet", b"text,label\nhello,a\n", ("parquet", "rows.parquet")),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_named_with_line_or_row(name: str, tmp_path: Path) -> None:
    file, content, said = FILES[name]
    (tmp_path / file).write_bytes(content)
    refused(DataError, lambda: data.read(tmp_path / file), str(tmp_path / file), *said)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], ("empty", "0 rows")),
        ({"train": []}, ("empty", "0 rows")),
        (Dataset.from_dict({"text": [], "label": []}), ("empty", "0 rows")),
        (["just text"], ("no record", "row 0", "str")),
        ([{"text": "a", "label": "x"}, None], ("no record", "row 1", "NoneType")),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}, {"txet": "c", "label": "x"}], ("row 2", "txet")),
        ([{"text": "a"}, {"text": "b"}, {"text": 3}], ("mixed kinds", "row 2", "'text'", "int: 3")),
    ],
    ids=["empty list", "empty split", "empty Dataset", "texts", "none", "misspelt", "mixed"],
)
def test_rows_that_are_no_table_are_refused(rows: Any, said: tuple[str, ...]) -> None:
    refused(DataError, lambda: data.read(rows), *said)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (5, ("not a source of rows", "int")),
        (None, ("not a source of rows", "NoneType")),
        ({"train": [{"text": "a"}], "tset": [{"text": "b"}]}, ("unknown split 'tset'", "Did you mean 'test'")),
        ({"train": [{"text": "a"}], "val": [{"text": "b"}], "dev": [{"text": "c"}]}, ("validation",)),
    ],
    ids=["number", "nothing", "split", "a split twice"],
)
def test_sources_that_cannot_be_are_refused(source: Any, said: tuple[str, ...]) -> None:
    refused(RequestError, lambda: data.read(source), *said)


def test_folders_without_training_rows_or_with_two_files_for_a_part_are_refused(tmp_path: Path) -> None:
    refused(RequestError, lambda: data.read(tmp_path), "no training file", "an empty folder")
    (tmp_path / "rows.csv").write_text("text,label\nhello,a\n")
    refused(RequestError, lambda: data.read(tmp_path), "no training file", "rows.csv", "train.csv")
    for name in ("train.csv", "train.tsv"):
        (tmp_path / name).write_text("text,label\nhello,a\n")
    refused(RequestError, lambda: data.read(tmp_path), "two files", "'train'", "train.csv and train.tsv")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    refused(RequestError, lambda: data.read(tmp_path / "rows.xlsx"), "unknown kind", "rows.xlsx", "csv")


# ---------------------------------------------------------------------- rows for a task

ROWS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no text column": ([{"txt": "a", "label": "a"}], ("no column 'text'", "txt", "columns={'text'")),
    "no label column": ([{"text": "a"}], ("no column 'label'", "text", "columns={'label'")),
    "empty text": ([{"text": "a", "label": "a"}, {"text": "", "label": "a"}], ("empty text", "row 1", "'text'")),
    "blank text": ([{"text": "a", "label": "a"}, {"text": " \t\n", "label": "a"}], ("empty text", "row 1")),
    "missing text": ([{"text": "a", "label": "a"}, {"text": None, "label": "a"}], ("not text", "row 1", "None")),
    "numbers for texts": ([{"text": 1, "label": "a"}, {"text": 2, "label": "a"}], ("not text", "row 0", "1")),
    "lists for texts": ([{"text": ["a"], "label": "a"}], ("not text", "row 0")),
    "empty pair": ([{"text": "a", "text_pair": "", "label": "a"}], ("empty text", "row 0", "'text_pair'")),
    "missing pair": (
        [{"text": "a", "text_pair": "b", "label": "a"}, {"text": "a", "text_pair": None, "label": "a"}],
        ("not text", "row 1", "'text_pair'"),
    ),
    "unknown label": ([{"text": "a", "label": "d"}], ("unknown label 'd'", "row 0", "a, b, c")),
    "empty label": ([{"text": "a", "label": "a"}, {"text": "b", "label": ""}], ("label is missing", "row 1")),
    "missing label": ([{"text": "a", "label": "a"}, {"text": "b", "label": None}], ("label is missing", "row 1")),
    "number for a label": ([{"text": "a", "label": 0}], ("number 0", "name is needed", "row 0", "a, b, c")),
    "no rows": ([], ("empty", "0 rows")),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_the_task_cannot_take_are_named(name: str, tmp_path: Path) -> None:
    rows, said = ROWS[name]
    adapted = adapted_on(strategy="probe")
    args = {"output_dir": str(tmp_path / "run")}
    refused(DataError, lambda: adapters.evaluate(adapted, rows), *said)
    refused(DataError, lambda: adapters.Trainer(adapted, args, rows), *said)
    refused(DataError, lambda: adapters.Trainer(adapted, args, tiny.rows(6), rows), *said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in ROWS if "label" not in name])
def test_rows_that_cannot_be_answered_are_named(name: str) -> None:
    rows, said = ROWS[name]
    adapted = adapted_on(strategy="probe")
    unlabelled = [{key: value for key, value in row.items() if key != "label"} for row in rows]
    refused(DataError, lambda: adapters.predict(adapted, unlabelled), *said)


def test_texts_that_cannot_be_answered_are_named() -> None:
    adapted = adapted_on(strategy="probe")
    refused(DataError, lambda: adapters.predict(adapted, ["the parcel", ""]), "empty text", "row 1")
    refused(DataError, lambda: adapters.predict(adapted, ["the parcel", None]), "row 1", "NoneType")
    refused(DataError, lambda: adapters.predict(adapted, ["the parcel", 5]), "row 1", "int")
    refused(RequestError, lambda: adapters.predict(adapted, "where is my parcel"), "where is my parcel")


def test_data_without_the_part_that_is_needed_is_refused(tmp_path: Path) -> None:
    adapted = adapted_on(strategy="probe")
    others = {"test": tiny.rows(6)}
    args = {"output_dir": str(tmp_path / "run")}
    for call in (
        lambda: adapters.evaluate(adapted, others),
        lambda: adapters.predict(adapted, others),
        lambda: adapters.Trainer(adapted, args, others),
    ):
        with pytest.raises(AdaptersError, match="train"):
            call()


def test_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    adapted = adapted_on(strategy="probe")
    args, rows = {"output_dir": str(tmp_path / "run")}, [{"review": "good", "stars": "a"}]
    refused(
        DataError,
        lambda: adapters.Trainer(adapted, args, rows, columns={"text": "reviw", "label": "stars"}),
        "no column 'reviw'",
        "Did you mean 'review'",
    )
    refused(
        RequestError,
        lambda: adapters.Trainer(adapted, args, rows, columns={"txt": "review"}),
        "no column 'txt'",
        "Did you mean 'text'",
    )
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- adapter folders


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def flip(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def edit(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter.json"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    return change


def put(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "truncated weights": (cut, ("truncated", "adapter_model.safetensors", "bytes")),
    "empty weights": (put("adapter_model.safetensors", b""), ("adapter_model.safetensors", "found 0 bytes")),
    "a flipped bit": (flip, ("changed", "adapter_model.safetensors", "tensor base_model.model.")),
    "no weights": (drop("adapter_model.safetensors"), ("missing", "adapter_model.safetensors")),
    "an edited option": (edit('"target_modules"', '"target_module"'), ("edited", "adapter.json", "digest")),
    "an edited label": (edit('"labels": [', '"labels": ["d",'), ("edited", "adapter.json", "digest")),
    "an edited fingerprint": (edit('"digest": "', '"digest": "0'), ("edited", "adapter.json", "digest")),
    "half a manifest": (put("adapter.json", b'{"format": 1, "strategy'), ("broken", "adapter.json")),
    "another JSON": (put("adapter.json", b"[]"), ("not a manifest", "adapter.json")),
    "a manifest without a digest": (put("adapter.json", b'{"format": 1}'), ("adapter.json", "digest")),
    "a newer format": (edit('"format": 1', '"format": 99'), ("newer version", "99", "pip install -U")),
    "no tokenizer file": (drop("tokenizer.json"), ("missing", "tokenizer.json")),
    "a changed tokenizer": (put("tokenizer.json", b"{}"), ("changed", "tokenizer.json")),
    "a pickle": (put("pytorch_model.bin", b"x"), ("pytorch_model.bin",)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_edited_folder_is_refused_by_everything_that_reads_it(
    name: str, copy: Path, base: str, tmp_path: Path
) -> None:
    damage, said = DAMAGES[name]
    damage(copy)
    refused(FolderError, lambda: adapters.load(copy), str(copy), *said)
    refused(FolderError, lambda: adapters.load(copy, verify="off"), str(copy), *said)
    refused(FolderError, lambda: adapters.merge_on_disk(copy, tmp_path / "merged", base=base), str(copy), *said)
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_people_may_edit_the_card_and_the_recipe(copy: Path) -> None:
    (copy / "README.md").write_text("my own words")
    assert adapters.load(copy).task.labels == ("a", "b", "c")


@pytest.mark.parametrize("content", [(), ("config.json", "model.safetensors")], ids=["empty", "a model"])
def test_a_folder_that_is_no_adapter_is_refused(content: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in content:
        (folder / name).write_text("{}")
    found = ", ".join(content) or "an empty folder"
    refused(FolderError, lambda: adapters.load(folder), "not an adapter folder", str(folder), "adapter.json", found)
    refused(FolderError, lambda: adapters.merge_on_disk(folder, tmp_path / "out"), "not an adapter folder")
    assert not (tmp_path / "out").exists()


def test_an_unknown_level_of_verification_is_refused(saved: Path) -> None:
    refused(RequestError, lambda: adapters.load(saved, verify="loose"), "'loose'", "strict, fast, off")


# ---------------------------------------------------------------------- other backbones


@pytest.mark.parametrize("verify", ["strict", "fast"])
def test_another_backbone_of_the_same_shapes_is_refused_with_its_tensors(
    verify: str, saved: Path, tmp_path: Path
) -> None:
    other = tiny.folder("bert", tmp_path / "other", seed=7)
    said = ("not the backbone", "embeddings.word_embeddings.weight", "tensors differ", "verify='off'")
    refused(BackboneError, lambda: adapters.load(saved, other, verify=verify), *said)
    refused(BackboneError, lambda: adapters.load(saved, tiny.model("bert", seed=7), verify=verify), *said)
    text = refused(BackboneError, lambda: adapters.merge_on_disk(saved, tmp_path / "out", base=other), "weight")
    assert "embeddings" in text
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other"]


def test_one_changed_tensor_is_enough_and_is_named(saved: Path, base: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(base)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3, 4] += 1e-3
    model.save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    name = "encoder.layer.1.output.dense.weight"
    refused(BackboneError, lambda: adapters.load(saved, tmp_path / "other"), name, "1 of ")
    refused(BackboneError, lambda: adapters.merge_on_disk(saved, tmp_path / "out", base=tmp_path / "other"), name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_a_backbone_of_another_family_is_refused(kind: str, saved: Path, tmp_path: Path) -> None:
    other = tiny.folder(kind, tmp_path / "other")
    with pytest.raises(AdaptersError) as caught:
        adapters.load(saved, other)
    assert isinstance(caught.value, BackboneError | RequestError)
    with pytest.raises(AdaptersError):
        adapters.merge_on_disk(saved, tmp_path / "out", base=other)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- outputs


@pytest.mark.parametrize("content", [("thesis.txt",), ("config.json", "model.safetensors"), ("run.yaml",)], ids=str)
def test_an_output_that_holds_something_else_is_refused_and_untouched(
    content: tuple[str, ...], saved: Path, base: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in content:
        (out / name).write_text("{}")
    adapted = adapted_on(strategy="probe")
    said = ("already holds something else", str(out), content[0], "Give another output")
    refused(FolderError, lambda: adapters.save(adapted, out), *said)
    refused(FolderError, lambda: adapters.merge_on_disk(saved, out, base=base), *said)
    assert {entry.name: entry.read_text() for entry in out.iterdir()} == dict.fromkeys(content, "{}")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_an_output_that_is_a_file_or_a_link_is_refused(saved: Path, base: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "place")
    adapted = adapted_on(strategy="probe")
    for name in ("file", "link"):
        refused(FolderError, lambda name=name: adapters.save(adapted, tmp_path / name), str(tmp_path / name))
        refused(FolderError, lambda name=name: adapters.merge_on_disk(saved, tmp_path / name, base=base), name)
    assert (tmp_path / "file").read_text() == "x"
    assert list((tmp_path / "place").iterdir()) == []


@pytest.mark.parametrize("dtype", ["float99", "int8", "bool"])
def test_a_merge_into_what_cannot_hold_weights_is_refused(dtype: str, saved: Path, base: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(RequestError, lambda: adapters.merge_on_disk(saved, out, base=base, dtype=dtype, check_logits=False), dtype)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- missing paths


@pytest.fixture
def no_lookups(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every way to the hub, watched: a path that is missing must not take it."""
    import datasets
    import huggingface_hub
    import transformers

    taken: list[str] = []

    def watch(name: str) -> Callable[..., Any]:
        def look(*args: Any, **kwargs: Any) -> Any:
            taken.append(f"{name}{args}")
            raise OSError("no network here")

        return look

    monkeypatch.setattr(huggingface_hub, "snapshot_download", watch("snapshot_download"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", watch("try_to_load_from_cache"))
    monkeypatch.setattr(datasets, "load_dataset", watch("load_dataset"))
    for auto in (transformers.AutoModelForSequenceClassification, transformers.AutoTokenizer):
        monkeypatch.setattr(auto, "from_pretrained", watch("from_pretrained"))
    return taken


FILE_PATHS = ["missing.csv", "some/missing.jsonl", "missing.parquet"]
PATHS = ["./missing", "../missing", "/nowhere/missing", "~/missing-folder", "some/deep/missing", "missing/"]


@pytest.mark.parametrize("path", [*PATHS, Path("missing"), Path("some/missing")], ids=str)
def test_a_missing_model_folder_is_no_lookup(path: Any, no_lookups: list[str]) -> None:
    refused(RequestError, lambda: adapters.adapt(path, labels=LABELS), "no such model folder", str(path))
    assert no_lookups == []


@pytest.mark.parametrize("path", [*PATHS, "missing", Path("missing"), Path("some/missing")], ids=str)
def test_a_missing_adapter_folder_is_no_lookup(path: Any, no_lookups: list[str], tmp_path: Path) -> None:
    refused(FolderError, lambda: adapters.load(path), "no such adapter folder", str(path))
    refused(FolderError, lambda: adapters.merge_on_disk(path, tmp_path / "out"), "no such adapter folder", str(path))
    assert list(tmp_path.iterdir()) == []
    assert no_lookups == []


@pytest.mark.parametrize("path", [*PATHS, *FILE_PATHS, Path("missing"), Path("some/missing")], ids=str)
def test_a_missing_data_file_is_no_lookup(path: Any, no_lookups: list[str]) -> None:
    refused(RequestError, lambda: data.read(path), "no such file or folder", str(path))
    assert no_lookups == []


@pytest.mark.parametrize("path", [*PATHS, Path("missing"), Path("some/missing")], ids=str)
def test_a_missing_base_folder_is_no_lookup(path: Any, saved: Path, tmp_path: Path, no_lookups: list[str]) -> None:
    out = tmp_path / "out"
    refused(RequestError, lambda: adapters.merge_on_disk(saved, out, base=path), "no such backbone folder", str(path))
    assert list(tmp_path.iterdir()) == []
    assert no_lookups == []


def test_a_backbone_that_has_gone_is_said_with_its_place(tmp_path: Path) -> None:
    gone = tiny.folder("bert", tmp_path / "gone")
    adapted = adapters.adapt(gone, "probe", labels=LABELS)
    adapters.save(adapted, tmp_path / "out")
    shutil.rmtree(gone)
    refused(RequestError, lambda: adapters.load(tmp_path / "out"), "no such model folder", gone)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    refused(RequestError, lambda: adapters.adapt(tmp_path, labels=LABELS), "not a model folder", "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such type"}))
    refused(RequestError, lambda: adapters.adapt(tmp_path, labels=LABELS), "cannot be loaded", str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    refused(FolderError, lambda: adapters.adapt(tmp_path, labels=LABELS), "broken JSON", str(tmp_path / "config.json"))


def test_a_model_with_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = tiny.folder("bert", tmp_path / "base")
    file = Path(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdaptersError, match="base"):
        adapters.adapt(folder, labels=LABELS)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_model_without_a_tokenizer_is_refused(kind: str, tmp_path: Path) -> None:
    # transformers makes an empty tokenizer up, for which all texts are the same.
    tiny.backbone(kind).save_pretrained(tmp_path / "base")
    folder = str(tmp_path / "base")
    refused(RequestError, lambda: adapters.adapt(folder, labels=LABELS), "no tokenizer", folder, "processor=")
    adapted = adapters.adapt(folder, labels=LABELS, processor=tiny.tokenizer())
    assert len(adapted.processor) == len(tiny.VOCABULARY)


def test_what_from_pretrained_does_not_take_is_refused(base: str) -> None:
    for load in ({"dtype": "float99"}, {"nonsense": 1}):
        refused(RequestError, lambda load=load: adapters.adapt(base, labels=LABELS, load=load), next(iter(load)))
