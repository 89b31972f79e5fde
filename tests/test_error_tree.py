"""The tree of errors: everything raised is in it, its page lists it, and the stack's raw errors come out translated."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
import tiny
import torch

import adapters
from adapters import errors, ranks, shards
from adapters.errors import AdaptersError

ROOT = Path(adapters.__file__).parent
PAGE = (ROOT.parent / "docs" / "errors.md").read_text(encoding="utf-8")
TREE = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, AdaptersError) and kind is not AdaptersError
}
LABELS = hostile.LABELS

# Raised on purpose without being of the tree: what a protocol of Python or of a library demands.
PROTOCOLS = {
    ("__init__.py", "AttributeError"): "a module's __getattr__",
    ("__main__.py", "SystemExit"): "the exit code of a signal before there is a command",
    ("chunked.py", "TypeError"): "what a slice that cannot be raises",
    ("cli.py", "SystemExit"): "the exit code",
    ("doctor.py", "typer.Exit"): "the exit code of a report with faults",
    ("validate.py", "typer.Exit"): "the exit code of a report with faults",
    ("crew.py", "Ended"): "ends a thread's task, and is caught there",
    ("crew.py", "faults[0]"): "a thread's first fault, in the thread that waits for it",
    ("disk.py", "OSError"): "what a call of the system says; whoever knows the folder names it",
    ("forms.py", "ValueError"): "what is no form; it is computed again",
    ("handing.py", "TypeError"): "a block that cannot be passed over; whoever tries it says so",
    ("interrupts.py", "SystemExit"): "what a signal ends the process with",
    ("journal.py", "OSError"): "a disk that is full; the journal says so once and the run goes on",
    ("jsontext.py", "ValueError"): "what a decoder raises; whoever knows the file names it",
    ("ranks.py", "fault"): "what the first process raised, told to the others before",
    ("readout.py", "_Reached"): "ends a pass at the output layer, and is caught there",
    ("prefix.py", "_Reached"): "ends a pass at the cut, and is caught there",
    ("states.py", "ValueError"): "a state of no dimension, which no row has",
    ("stops.py", "SystemExit"): "what a signal ends the process with",
    ("rendering.py", "ValueError"): "what a template says; whoever knows the row names it",
    ("schema.py", "ValueError"): "what a validator of pydantic raises",
}


def raised(path: Path) -> list[tuple[int, str]]:
    """What a module raises by name, with the line; bare raises and caught errors raised again are left out."""
    tree = ast.parse(path.read_text())
    makers = {
        node.name: ast.unparse(node.returns)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.returns is not None
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            made = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = ast.unparse(made)
            found.append((node.lineno, makers.get(name, name)))
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_raise_is_of_the_tree(path: Path) -> None:
    for line, name in raised(path):
        if name in TREE or name == "AdaptersError" or (path.name, name) in PROTOCOLS:
            continue
        assigned = re.findall(rf"^\s*{re.escape(name)} = (\w+)\(", path.read_text(), re.M)
        assert assigned, f"{path}:{line}: raises {name}"
        assert set(assigned) <= set(TREE), f"{path}:{line}: raises {name}, made by {assigned}"


def test_the_exceptions_from_the_rule_are_needed() -> None:
    found = {(path.name, name) for path in ROOT.rglob("*.py") for _, name in raised(path)}
    assert set(PROTOCOLS) <= found


def test_the_page_lists_every_class_with_its_kind_and_exit_code() -> None:
    assert PAGE.count("\n## ") == len(TREE) + 2
    for name, kind in TREE.items():
        assert f"\n## {name}\n" in PAGE
        also = kind.__mro__[2].__name__ if kind.__mro__[1] is AdaptersError else ""
        assert re.search(rf"── {name} +{also} +{kind.exit_code}\n", PAGE), name
        assert getattr(adapters, name) is kind


def test_nothing_is_raised_that_is_not_public() -> None:
    assert set(TREE) | {"AdaptersError"} <= set(adapters.__all__)


# ---------------------------------------------------------------------- each class, really raised


def adapted_on(strategy: str = "lora", **options: Any) -> adapters.Adapted:
    return adapters.adapt(tiny.model("bert"), strategy, labels=LABELS, processor=tiny.tokenizer(), **options)


def prepared(**changes: Any) -> list[dict[str, Any]]:
    row = {"input_ids": [2, 5, 6, 3], "attention_mask": [1, 1, 1, 1]}
    return [{**row, "labels": number % 3, **changes} for number in range(6)]


def train(rows: Any, **options: Any) -> Any:
    args = {"output_dir": "run", "num_train_epochs": 1, "disable_tqdm": True, **options}
    return adapters.Trainer(adapted_on("probe"), args, rows).train()


def broken_child(monkeypatch: pytest.MonkeyPatch) -> Any:
    broken = Path("python").absolute()
    broken.write_text("#!/bin/sh\necho 'no python here' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    adapted = adapters.adapt(tiny.folder("bert", "base"), "probe", labels=LABELS)
    return adapters.merge_on_disk(adapters.save(adapted, "adapter"), "merged")


def other_backbone(monkeypatch: pytest.MonkeyPatch) -> Any:
    adapted = adapters.adapt(tiny.folder("bert", "base"), "probe", labels=LABELS)
    return adapters.load(adapters.save(adapted, "adapter"), tiny.folder("bert", "other", seed=1))


def infinite(monkeypatch: pytest.MonkeyPatch) -> Any:
    adapted = adapted_on()
    with torch.no_grad():
        adapted.model.classifier.bias.fill_(0)[0] = float("inf")
    return adapters.save(adapted, "out")


def full_disk(monkeypatch: pytest.MonkeyPatch) -> Any:
    def refuse(stream: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "flush", refuse)
    return adapters.save(adapted_on(), "out")


def pointer(monkeypatch: pytest.MonkeyPatch) -> Any:
    Path("adapter_model.safetensors").write_bytes(hostile.TEXTS["a pointer"])
    return shards.read_header(Path("adapter_model.safetensors"))


def unmoved(monkeypatch: pytest.MonkeyPatch) -> Any:
    adapted = adapted_on()
    adapted.model.classifier.bias.requires_grad_(False)
    return adapters.Trainer(adapted, {"output_dir": "run", "disable_tqdm": True}, prepared()).train()


def second(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(ranks, "joined", lambda: True)
    monkeypatch.setattr(ranks, "first", lambda: False)
    monkeypatch.setattr(ranks, "_until_first_is_here", lambda: None)
    monkeypatch.setattr(ranks, "gathered", lambda value: [["KeyError", "odd"], value])
    return ranks.by_first(lambda: None)


def spent(monkeypatch: pytest.MonkeyPatch) -> Any:
    adapted = adapted_on()
    adapters.merge(adapted)
    return adapters.merge(adapted)


def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    return adapted_on("qlora")


EXAMPLES: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "AdaptersError": broken_child,
    "RequestError": lambda _: adapted_on(lora_r=4),
    "DataError": lambda _: train(prepared(labels=3)),
    "FolderError": pointer,
    "DiskError": full_disk,
    "BackboneError": other_backbone,
    "NumbersError": infinite,
    "ContractError": unmoved,
    "RankError": second,
    "SpentError": spent,
    "MissingPackageError": without_bitsandbytes,
}


@pytest.mark.parametrize("name", ["AdaptersError", *TREE])
def test_the_page_shows_what_is_really_said(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdaptersError) as caught:
        EXAMPLES[name](monkeypatch)
    assert type(caught.value).__name__ == name
    section = PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]
    example = next(line for line in section.splitlines() if line.startswith("> ")).removeprefix("> ")
    pattern = ".*".join(re.escape(piece) for piece in example.split("..."))
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)
    assert "What to do: " in section


def test_a_message_is_one_printable_line() -> None:
    said = errors.message("a\nb", where="x\x1b[31m", found="\u202e\x00")
    assert said == "a b (x\\x1b[31m); found \\u202e\\x00"


# ---------------------------------------------------------------------- the stack's raw errors


def missing_resume(folder: str) -> Any:
    args = {"output_dir": "run", "num_train_epochs": 1, "disable_tqdm": True}
    resume: Any = True if folder == "run" else folder
    return adapters.Trainer(adapted_on("probe"), args, prepared()).train(resume_from_checkpoint=resume)


def json_of(name: str, text: bytes) -> Any:
    folder = Path(tiny.folder("bert", "base"))
    (folder / name).write_bytes(text)
    return adapters.adapt(str(folder), labels=LABELS)


RAW: dict[str, tuple[Callable[[], Any], str, tuple[str, ...]]] = {
    "KeyError: 'MAGIC'": (
        lambda: adapted_on("peft", config={"peft_type": "MAGIC"}),
        "RequestError",
        ("unknown peft_type 'MAGIC'", "Known: "),
    ),
    "KeyError: 'peft_type'": (lambda: adapted_on("peft", config={}), "RequestError", ("peft_type",)),
    "'<=' not supported between 'str' and 'int'": (
        lambda: adapted_on(r="8"),
        "RequestError",
        ("(r)", "expected int", "'8'"),
    ),
    "JSONDecodeError": (lambda: json_of("config.json", b"{"), "FolderError", ("broken JSON", "base/config.json")),
    "UnicodeDecodeError": (lambda: json_of("config.json", b"\xff\xfe"), "FolderError", ("base/config.json", "utf-8")),
    "a TypeError for null": (lambda: json_of("config.json", b"null"), "FolderError", ("base/config.json", "object")),
    "header too large": (
        lambda: json_of("model.safetensors", hostile.TEXTS["a page"]),
        "FolderError",
        ("HTML page", "base/model.safetensors"),
    ),
    "Target 3 is out of bounds": (lambda: train(prepared(labels=3)), "DataError", ("row 0", "0 to 2", "found 3")),
    "Target -1 is out of bounds": (lambda: train(prepared(labels=-1)), "DataError", ("row 0", "0 to 2", "found -1")),
    "a loss of nan": (lambda: train(prepared(labels=-100)), "DataError", ("row 0", "found -100")),
    "too many dimensions 'str'": (lambda: train(prepared(labels="a")), "DataError", ("row 0", "'labels'", "'a'")),
    "model did not return a loss": (
        lambda: train([{"text": "x", "target": "a"}] * 6),
        "DataError",
        ("no column 'label'", "found text, target", "columns="),
    ),
    "expanded size (80) must match (40)": (
        lambda: train(prepared(input_ids=[5] * 80, attention_mask=[1] * 80)),
        "DataError",
        ("row 0", "1 to 40 ids", "found 80"),
    ),
    "index out of range in self": (
        lambda: train(prepared(input_ids=[2, 64, 6, 3])),
        "DataError",
        ("row 0", "0 to 63", "from 2 to 64"),
    ),
    "index out of range in self, below": (
        lambda: train(prepared(input_ids=[2, -1, 6, 3])),
        "DataError",
        ("row 0", "from -1 to 6"),
    ),
    "ids that are cut to whole numbers": (
        lambda: train(prepared(input_ids=[2.5, 1.0, 2.0, 3.0])),
        "DataError",
        ("'input_ids'", "whole numbers", "float"),
    ),
    "ids that are texts": (
        lambda: train(prepared(input_ids=["a", "b", "c", "d"])),
        "DataError",
        ("'input_ids'", "whole numbers", "string"),
    ),
    "a mask that hides tokens": (
        lambda: train(prepared(attention_mask=[1, 1])),
        "DataError",
        ("row 0", "'attention_mask'", "expected 4", "found 2"),
    ),
    "num_samples=0": (lambda: train([]), "DataError", ("empty", "0 rows")),
    "args.max_steps must be set": (
        lambda: train(tiny.rows(6), dataloader_drop_last=True, per_device_train_batch_size=64),
        "RequestError",
        ("dataloader_drop_last", "expected False"),
    ),
    "FileNotFoundError of True": (lambda: missing_resume("run"), "FolderError", ("no whole checkpoint", "run")),
    "FileNotFoundError of a folder": (
        lambda: missing_resume("nope"),
        "FolderError",
        ("not a whole checkpoint", "nope"),
    ),
    "expected str, bytes or os.PathLike": (
        lambda: adapters.load(None),
        "RequestError",
        ("folder or hub id", "NoneType"),
    ),
    "embedded null byte": (lambda: adapters.save(adapted_on("probe"), "a\0b"), "FolderError", ("no name of a folder",)),
    "FileNotFoundError of an output": (
        lambda: adapters.save(adapted_on("probe"), "/proc/nowhere/out"),
        "DiskError",
        ("cannot be written", "/proc/nowhere/out"),
    ),
    "couldn't connect to huggingface.co": (
        lambda: adapters.adapt("./outputs/run1", labels=LABELS),
        "RequestError",
        ("no such model folder", "./outputs/run1"),
    ),
}


@pytest.mark.parametrize("raw", RAW)
def test_a_raw_error_comes_out_translated(raw: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call, kind, said = RAW[raw]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdaptersError) as caught:
        call()
    assert type(caught.value).__name__ == kind, str(caught.value)
    for words in said:
        assert words in str(caught.value), str(caught.value)
