"""An exported graph answers as the adapted model does, whatever its batches; what no graph can hold is refused."""

from __future__ import annotations

import builtins
import errno
import functools
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cells
import numpy as np
import onnxruntime
import pytest
import tiny
import torch

import adapters
from adapters import agreement, int8, onnxfile, sessions, shards, tracing
from adapters.export import findings


@dataclass(frozen=True)
class Cell:
    """An adapter that is exported."""

    kind: str
    strategy: str
    task: str = "text-classification"
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    form: str = ""

    def __str__(self) -> str:
        return f"{self.kind}-{self.strategy}-{self.task}{self.form}"


NUMBERS = {"problem": "regression", "labels": []}
SEVERAL = {"problem": "multi-label", "labels": list(tiny.LABELS)}
CELLS = [
    Cell("bert", "lora"),
    Cell("roberta", "probe", options={"pooling": "mean", "layer": 2}, form="-mean-of-2"),
    Cell("distilbert", "freeze", "token-classification"),
    Cell("vit", "dora", "image-classification"),
    Cell("gpt2", "bitfit"),
    Cell("llama", "dora", dtype="bfloat16", form="-bfloat16"),
    Cell("bert", "lora", "question-answering"),
    Cell("roberta", "bitfit", options=SEVERAL, form="-multi-label"),
    Cell("distilbert", "dora", options=NUMBERS, form="-regression"),
    Cell("bert", "qlora"),
]


def rows_of(cell: Cell, n: int = 12) -> list[dict[str, Any]]:
    rows = cells.rows(cell.task, n)
    if cell.options.get("problem") == "regression":
        return [{**row, "label": float(number % 5)} for number, row in enumerate(rows)]
    if cell.options.get("problem") == "multi-label":
        return [{**row, "label": [row["label"]]} for row in rows]
    return rows


def saved(cell: Cell, place: Path) -> Path:
    """The folder of an adapter that does something."""
    blocks = {"distilbert": "n_layers", "gpt2": "n_layer"}.get(cell.kind, "num_hidden_layers")
    shape = {} if "layer" in cell.options else {blocks: 2}
    base = tiny.folder(cell.kind, place / "base", initializer_range=0.3, **shape)  # answers that differ from row to row
    options = {**cells.TASK_OPTIONS.get(cell.task, {}), **cells.OPTIONS.get(cell.strategy, {}), **cell.options}
    load = {"dtype": cell.dtype} if cell.dtype else None
    adapted = adapters.adapt(base, cell.strategy, task=cell.task, load=load, **options)
    tiny.shake(adapted, 0.2)
    return adapters.save(adapted, place / "adapter")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No child processes, and short timings."""
    monkeypatch.setattr(tracing, "merge_on_disk", functools.partial(tracing.merge_on_disk, check_logits=False))
    monkeypatch.setattr(sessions, "ROUNDS", 3)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bert with LoRA, saved; its export in float32 lies beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions, "ROUNDS", 1)
        place = tmp_path_factory.mktemp("bert")
        whole = torch.onnx.export
        patch.setattr(torch.onnx, "export", lambda *a, **k: PROGRAMS.setdefault("bert", whole(*a, **k)))
        adapters.export(saved(CELLS[0], place), place / "graph", to="onnx", rows=rows_of(CELLS[0]))
    return place


PROGRAMS: dict[str, Any] = {}


@pytest.fixture
def traced(bert: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, of which further exports take the graph that has been traced already."""
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: PROGRAMS["bert"])
    return bert


def batches(cell: Cell, model: Any) -> Iterator[dict[str, Any]]:
    """Batches of other sizes than the traced one, rows of several lengths in them."""
    if cell.kind == "vit":
        yield from (tiny.inputs(model, n, seed=n) for n in (1, 3, 17))
        return
    for n, length in ((1, 5), (3, 9), (17, 32), (2, 1)):
        made = tiny.batch(n, length, seed=n) if length > 3 else tiny.batch(n, 5)
        made = {name: value[:, :length].clone() for name, value in made.items()}
        made["input_ids"][made["attention_mask"] == 0] = model.config.pad_token_id
        yield made


def ran(session: Any, batch: dict[str, Any]) -> list[Any]:
    return [torch.from_numpy(part) for part in session.run(None, {name: v.numpy() for name, v in batch.items()})]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_graph_answers_as_the_adapted_model_does(cell: Cell, tmp_path: Path) -> None:
    folder, out = saved(cell, tmp_path), tmp_path / "graph"
    rows = rows_of(cell)
    report = adapters.export(folder, out, to="onnx", rows=rows)
    assert report.compared
    assert report.agreement == 1.0
    assert report.max_difference is not None
    assert report.max_difference < 1e-4
    assert report.spread is not None
    assert report.spread > 0.01

    adapted = adapters.load(folder)
    wanted = adapters.evaluate(adapted, rows)
    bound = 1e-4 if cell.strategy != "qlora" else 2e-2  # what 4 bits stand for, computed in full precision
    if cell.dtype is None:
        wanted.pop("loss")
        assert report.facts["metrics"]["onnx"] == pytest.approx(wanted, abs=bound)
    model: Any = adapted.model
    model.float().eval()
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    assert names == [name for name in adapted.processor.model_input_names if name != "token_type_ids"]
    answers = ["start_logits", "end_logits"] if cell.task == "question-answering" else ["logits"]
    assert [entry.name for entry in session.get_outputs()] == answers
    for batch in batches(cell, model):
        with torch.no_grad():
            outputs = model(**batch)
        for name, found in zip(answers, ran(session, batch), strict=True):
            expected, mask = outputs[name], batch.get("attention_mask")
            if expected.shape[:2] == getattr(mask, "shape", None):  # an answer a place: at padding it means nothing
                expected, found = expected[mask.bool()], found[mask.bool()]
            assert float((expected - found).abs().max()) <= bound
    if cell.kind != "vit":
        _padding_changes_nothing(session, model)


def _padding_changes_nothing(session: Any, model: Any) -> None:
    ids = torch.tensor([[7, 21, 33, 9, 40]])
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pad = torch.full((1, 6), model.config.pad_token_id)
    long = {
        "input_ids": torch.cat([ids, pad], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros_like(pad)], 1),
    }
    for one, other in zip(ran(session, short), ran(session, long), strict=True):
        there = other[:, :5] if one.ndim == 3 or one.shape[-1] == 5 else other
        assert torch.allclose(one, there, atol=1e-5)


def test_what_lies_beside_the_graph(bert: Path) -> None:
    out = bert / "graph"
    names = {"model.onnx", "config.json", "export.json", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in out.iterdir()} == names
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    facts = json.loads((out / "export.json").read_text())
    document = json.loads((bert / "adapter" / "adapter.json").read_text())
    assert facts["adapter"] == document["digest"]
    assert facts["backbone"]["fingerprint"] == document["backbone"]["fingerprint"]["digest"]
    assert facts["agreement"] == 1.0
    assert facts["rows"] == 12
    assert facts["digest"] == shards.digest_of(facts)
    for name, entry in facts["files"].items():
        assert entry == {"size": (out / name).stat().st_size, "sha256": shards.sha256(out / name)}
    assert set(facts["versions"]) == {"torch", "transformers", "onnx", "onnxscript", "onnxruntime"}


def test_a_graph_tells_nothing_of_this_machine(bert: Path) -> None:
    content = (bert / "graph" / "model.onnx").read_bytes()
    assert os.fsencode(Path(torch.__file__).parent.parent) not in content
    assert b"stack_trace" not in content


def test_blocks_that_the_head_does_not_read_are_not_in_the_graph(tmp_path: Path) -> None:
    import onnx

    cell = Cell("bert", "probe", options={"pooling": "first", "layer": 1})
    adapters.export(saved(cell, tmp_path), tmp_path / "out", to="onnx")
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    named = [tensor.name for tensor in graph.initializer]
    assert any(".layer.0." in name for name in named)
    assert not any(".layer.1." in name or ".layer.2." in name or "pooler" in name for name in named)


def test_large_weights_lie_in_a_file_of_their_own(
    traced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxfile, "WHOLE", 0)
    for target in ("onnx", "int8"):
        out = tmp_path / target
        report = adapters.export(traced / "adapter", out, to=target, rows=rows_of(CELLS[0]), accept=True)
        assert (out / "model.onnx.data").stat().st_size > (out / "model.onnx").stat().st_size
        assert report.agreement == 1.0
        moved = tmp_path / f"{target}-moved"
        out.rename(moved)
        assert onnxruntime.InferenceSession(str(moved / "model.onnx")).get_inputs()[0].name == "input_ids"


# ---------------------------------------------------------------------- 8 bits


@pytest.mark.parametrize("cell", [CELLS[3], CELLS[4]], ids=str)
def test_8_bits_are_smaller_and_answer_nearly_alike(cell: Cell, tmp_path: Path) -> None:
    report = adapters.export(saved(cell, tmp_path), tmp_path / "out", to="int8", rows=rows_of(cell), accept=True)
    sizes = report.facts["bytes_of_weights"]
    assert sizes["int8"] == (tmp_path / "out" / "model.onnx").stat().st_size
    assert sizes["int8"] < 0.6 * sizes["float32"]
    assert report.mean_difference is not None
    assert report.spread is not None
    assert 0 < report.mean_difference < 0.1 * report.spread
    assert set(report.facts["metrics"]) == {"torch", "int8"}
    graph = sessions.Session(tmp_path / "out" / "model.onnx")
    assert set(next(iter(report.facts["milliseconds"].values()))) == {"torch", "int8"}
    if cell.kind != "vit":  # an answer does not hang on the rows beside it
        batch = tiny.batch(6, 9)
        batch["attention_mask"][:] = 1
        together = graph(**batch).logits
        alone = torch.cat([graph(**{n: v[i : i + 1] for n, v in batch.items()}).logits for i in range(6)])
        assert torch.allclose(together, alone, atol=1e-4)


def test_rounding_in_blocks_is_right_to_half_a_step() -> None:
    draw = np.random.default_rng(0)
    weight = (draw.normal(size=(7, 45)) * draw.lognormal(0, 2, (7, 1))).astype("float32")
    weight[3] = 0
    integers, scales = int8.blocks(weight)
    assert integers.shape == (7, 2, 32)
    assert integers.dtype == np.uint8
    again = ((integers.astype("float32") - 128) * scales[..., None]).reshape(7, -1)[:, :45]
    steps = np.repeat(scales, 32, 1)[:, :45]
    assert (np.abs(again - weight) <= 0.5 * steps + 1e-6).all()
    table, row = int8.rows(weight)
    assert table.dtype == np.int8
    assert (np.abs(table * row - weight) <= 0.5 * row + 1e-6).all()


def test_8_bits_need_rows_to_be_judged_by(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(adapters.RequestError, match=r"no rows to see how many.*--data.*--accept"):
        adapters.export(bert / "adapter", tmp_path / "out", to="int8")
    assert not (tmp_path / "out").exists()


def test_too_many_changed_answers_are_refused_unless_accepted(
    traced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = int8.blocks

    def turned(weight: Any) -> Any:
        integers, scales = right(weight)
        return integers, -scales

    monkeypatch.setattr(int8, "blocks", turned)
    rows = rows_of(CELLS[0], 48)
    wanted = [row["label"] for row in adapters.predict(adapters.load(traced / "adapter"), rows)]
    assert len(set(wanted)) > 1  # or a constant answer would agree
    with pytest.raises(adapters.NumbersError, match=r"8 bits change too many answers.*99%.*Nothing was written.*--acc"):
        adapters.export(traced / "adapter", tmp_path / "out", to="int8", rows=rows)
    assert list(tmp_path.iterdir()) == []
    report = adapters.export(traced / "adapter", tmp_path / "out", to="int8", rows=rows, accept=True)
    assert report.agreement is not None
    assert report.agreement < 0.99


# ---------------------------------------------------------------------- agreement


def test_what_counts_as_the_same_answer() -> None:
    one = torch.tensor([[2.0, 1.0], [0.0, 3.0], [-1.0, -2.0], [5.0, 5.5]])
    other = torch.tensor([[2.0, 1.1], [0.0, 3.0], [-2.5, -2.0], [5.0, 5.5]])
    best = agreement.compared([one], [other], "single-label", 0.5)
    assert best.agreement == 0.75
    assert best.answers == 4
    assert best.max_difference == pytest.approx(1.5)
    assert best.mean_difference == pytest.approx(0.2, abs=1e-6)
    each = agreement.compared([one], [-one], "multi-label", 0.5)
    assert each.agreement == 1 / 8  # a zero stays one
    assert each.answers == 8
    near = agreement.compared([one], [one + 0.09 * one.std(correction=0)], "regression", 0.5)
    far = agreement.compared([one], [one + 0.11 * one.std(correction=0)], "regression", 0.5)
    assert (near.agreement, far.agreement) == (1.0, 0.0)


# ---------------------------------------------------------------------- what is refused


def refused_tasks(place: Path) -> Iterator[tuple[Path, str]]:
    for kind, auto, task, strategy in (
        ("gpt2", "AutoModelForCausalLM", "causal-lm", "lora"),
        ("t5", "AutoModelForSeq2SeqLM", "seq2seq", "lora"),
        ("bert", "AutoModelForMaskedLM", "masked-lm", "lora"),
    ):
        base = tiny.folder(kind, place / f"{kind}-{task}", auto=auto)
        adapted = adapters.adapt(base, strategy, task=task)
        yield adapters.save(adapted, place / f"{task}-adapter"), task


def test_models_that_generate_are_refused(tmp_path: Path) -> None:
    for folder, task in refused_tasks(tmp_path):
        for target in ("onnx", "int8"):
            with pytest.raises(adapters.RequestError, match=rf"token by token.*{task}.*adapters merge"):
                adapters.export(folder, tmp_path / "out", to=target, rows=[{"text": "the"}])
            assert [finding.done for finding in findings(folder, to=target)] == ["refused"]
        assert not (tmp_path / "out").exists()


def test_a_check_of_what_fits_finds_nothing(bert: Path) -> None:
    assert findings(bert / "adapter", to="onnx") == []


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    adapted = adapters.adapt(tiny.folder("bart", tmp_path / "base"), "lora", labels=list(tiny.LABELS))
    adapters.save(adapted, tmp_path / "adapter")
    with pytest.raises(adapters.RequestError, match=r"an encoder-decoder is no single graph \(BartFor.*adapters merge"):
        adapters.export(tmp_path / "adapter", tmp_path / "out", to="onnx")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("missing", sessions.PACKAGES)
def test_a_missing_package_names_the_extra(
    missing: str, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(adapters.MissingPackageError, match=rf'needs {missing}.*pip install "holdfast\[onnx\]"'):
        adapters.export(bert / "adapter", tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()


def test_options_of_other_targets_are_refused(bert: Path, tmp_path: Path) -> None:
    for options in ({"dtype": "float16"}, {"rank": 4}):
        with pytest.raises(adapters.RequestError, match="written in float32, or with the target int8"):
            adapters.export(bert / "adapter", tmp_path / "out", to="onnx", **options)


def test_a_taken_output_is_refused(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(adapters.FolderError, match=r"already holds something else.*notes.txt"):
        adapters.export(bert / "adapter", tmp_path / "out", to="onnx")
    for target in (bert / "adapter", bert / "adapter" / "graph"):
        with pytest.raises(adapters.RequestError, match="the output "):
            adapters.export(bert / "adapter", target, to="onnx")
    edited = tmp_path / "edited"
    edited.mkdir()
    (edited / "model.onnx").touch()
    (edited / "export.json").write_text('{"digest": "0"}')
    with pytest.raises(adapters.FolderError, match="already holds something else"):
        adapters.export(bert / "adapter", edited, to="onnx")


def test_rows_that_do_not_fit_are_named_and_nothing_is_left(bert: Path, tmp_path: Path) -> None:
    for rows, said in (
        ([{"text": "the", "label": "zebra"}], "zebra"),
        ([{"text": 3}], "row 0"),
        ([{"sentence": "the"}], "text"),
    ):
        with pytest.raises(adapters.DataError, match=said):
            adapters.export(bert / "adapter", tmp_path / "out", to="onnx", rows=rows)
        assert list(tmp_path.iterdir()) == []


def test_a_graph_that_answers_otherwise_is_not_written(
    traced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = sessions.Session.__call__

    def other(self: Any, **batch: Any) -> Any:
        found = plain(self, **batch)
        found.logits[:, 0] += 0.01
        return found

    monkeypatch.setattr(sessions.Session, "__call__", other)
    with pytest.raises(adapters.NumbersError, match=r"does not answer as the adapted model does.*1.0e-02 apart"):
        adapters.export(traced / "adapter", tmp_path / "out", to="onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_torch_cannot_export_is_said(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr(torch.onnx, "export", broken)
    with pytest.raises(adapters.RequestError, match=r"cannot export.*BertFor.*no such operator.*adapters merge"):
        adapters.export(bert / "adapter", tmp_path / "out", to="onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(traced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = builtins.open

    class Full:
        """A file on a disk with no more room."""

        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def write(self, *_: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: Any) -> None:
            self.stream.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

    def opened(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        stream = whole(file, mode, *rest, **options)
        return Full(stream) if "w" in mode and str(file).endswith("model.onnx") else stream

    monkeypatch.setattr(builtins, "open", opened)
    with pytest.raises(adapters.DiskError, match="No space left"):
        adapters.export(traced / "adapter", tmp_path / "out", to="onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_outlives_a_failing_disk(
    traced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(traced / "graph", tmp_path / "out")
    before = {file.name: shards.sha256(file) for file in (tmp_path / "out").iterdir()}

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(shards, "copy", refuse)
        with pytest.raises(adapters.DiskError, match="Input/output error"):
            adapters.export(traced / "adapter", tmp_path / "out", to="int8", accept=True)
    assert {file.name: shards.sha256(file) for file in (tmp_path / "out").iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    adapters.export(traced / "adapter", tmp_path / "out", to="int8", accept=True)  # and is replaced whole
    assert json.loads((tmp_path / "out" / "export.json").read_text())["target"] == "int8"


def test_the_exporters_chatter_is_not_ours() -> None:
    told = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = told.isEnabledFor(logging.WARNING)
    with tracing.hushed():
        assert not told.isEnabledFor(logging.WARNING)
    assert told.isEnabledFor(logging.WARNING) == before
