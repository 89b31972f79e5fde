"""Tokens and padding are counted right, shown where they are looked for; evaluation pads little and keeps the order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapters
from adapters import throughput
from adapters.throughput import Tally, Throughput, tally
from tests import tiny
from tests.test_causal_lm import net, texts, words

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}


def uneven(count: int = 14) -> list[dict[str, str]]:
    """Texts of 1 to 5 words, in no order of length."""
    return [
        {"text": " ".join(row["text"].split()[: 1 + (3 * n) % 5]), "label": row["label"]}
        for n, row in enumerate(tiny.rows(count))
    ]


def classifier(kind: str = "bert") -> Any:
    return adapters.adapt(tiny.model(kind), "lora", labels=list(tiny.LABELS), processor=tiny.tokenizer())


# ---------------------------------------------------------------------- counting


def test_a_batch_is_counted_by_its_mask_or_by_its_rows() -> None:
    import torch

    ids = torch.ones(2, 5, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    assert tally({"input_ids": ids, "attention_mask": mask}, []) == Tally(7, 10)
    assert tally({"input_ids": ids}, [{"input_ids": [1] * 5}, {"input_ids": [1] * 3}]) == Tally(8, 10)
    labels = torch.tensor([[1, 2, 3], [1, -100, -100]])
    both = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": labels, "labels": labels}
    assert tally(both, []) == Tally(11, 16)
    assert tally({"pixel_values": torch.ones(1)}, []) == Tally()
    assert Tally(7, 10).padding == pytest.approx(0.3)


def test_what_lies_between_steps_costs_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    meter = Throughput()
    for pause in (0.0, 100.0):
        now[0] += pause
        meter.begin()
        meter.take([{"counted": Tally(30, 40), "labels": None}])
        now[0] += 2.0
        meter.on_step_end(None, None, None)
    assert meter.lately() == {"tokens_per_second": 15.0, "padding": 0.25}
    assert meter.lately() == {}
    again = Throughput()
    again.start(*meter.place())
    assert again.totals() == meter.totals() == {"tokens": 60, "tokens_per_second": 15.0, "padding": 0.25}
    assert throughput.said(meter.totals()) == "15 tokens/s, 25 % padding"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_logs_and_records_what_it_read(workers: int, tmp_path: Path) -> None:
    rows = uneven()
    adapted = classifier()
    given = {"output_dir": str(tmp_path), "num_train_epochs": 2, "logging_steps": 2, "dataloader_num_workers": workers}
    trainer = adapters.Trainer(adapted, {**QUIET, **given, "per_device_train_batch_size": 4}, rows, rows[:5])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["tokens_per_second"] > 0 and 0 <= entry["padding"] < 1 for entry in logged)
    record = adapted.record.metrics["train"]
    lengths = [len(row["text"].split()) + 2 for row in rows]
    assert record["tokens"] == 2 * sum(lengths)
    assert record["tokens_per_second"] > 0
    assert 0 < record["padding"] < 0.5
    adapters.save(adapted, tmp_path / "out")  # the manifest takes them


def test_pictures_have_no_tokens(tmp_path: Path) -> None:
    import torch
    from datasets import Dataset

    rows = Dataset.from_dict({"pixel_values": torch.randn(4, 3, 16, 16).tolist(), "labels": [0, 1, 2, 0]})
    adapted = adapters.adapt(
        tiny.model("vit"),
        "probe",
        task="image-classification",
        processor=tiny.image_processor(),
        labels=["a", "b", "c"],
    )
    adapters.Trainer(adapted, {**QUIET, "output_dir": str(tmp_path), "max_steps": 1}, rows).train()
    assert "tokens" not in adapted.record.metrics["train"]


def test_packed_blocks_hold_less_padding_than_their_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"{text} ", "completion": "late"} for text in texts(12)]
    rows += [{"prompt": "the ", "completion": "late"} for _ in range(12)]
    found = {}
    for packing in (True, False):
        adapted = adapters.adapt(net(), "lora", task="causal-lm", processor=words(), packing=packing, max_length=24)
        given = {"output_dir": str(tmp_path / str(packing)), "num_train_epochs": 1, "train_sampling_strategy": "random"}
        adapters.Trainer(adapted, {**QUIET, **given}, rows).train()
        found[packing] = adapted.record.metrics["train"]
    assert found[True]["tokens"] == found[False]["tokens"]
    assert found[True]["padding"] < found[False]["padding"] / 2


# ---------------------------------------------------------------------- evaluation


def test_evaluation_reads_the_longest_rows_first_and_draws_nothing(tmp_path: Path) -> None:
    import torch

    rows = uneven()
    adapted = classifier()
    trainer = adapters.Trainer(adapted, {**QUIET, "output_dir": str(tmp_path)}, None, rows)
    state = torch.random.get_rng_state()
    order = list(trainer._get_eval_sampler(trainer.eval_dataset))
    assert torch.equal(torch.random.get_rng_state(), state)
    lengths = [trainer.eval_dataset["length"][n] for n in order]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(order) == list(range(len(rows)))


def test_predictions_and_ones_own_metrics_come_in_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = uneven()
    seen: list[Any] = []

    def metrics(found: Any) -> dict[str, float]:
        seen.append((found.predictions, found.label_ids))
        return {"mine": 1.0}

    adapted = classifier()
    given = {**QUIET, "output_dir": str(tmp_path), "per_device_eval_batch_size": 4}
    trainer = adapters.Trainer(adapted, given, None, rows, compute_metrics=metrics)
    trainer.evaluate()
    wanted = [{entry["label"]: entry["score"] for entry in answer} for answer in _scores(adapted, rows)]
    truth = [tiny.LABELS.index(row["label"]) for row in rows]
    result = trainer.predict(trainer.eval_dataset)
    for predictions, labels in (*seen, (result.predictions, result.label_ids)):
        assert labels.tolist() == truth
        shares = np.exp(predictions) / np.exp(predictions).sum(-1, keepdims=True)
        np.testing.assert_allclose(shares, [[row[name] for name in tiny.LABELS] for row in wanted], rtol=1e-4)


def _scores(adapted: Any, rows: list[dict[str, str]]) -> list[list[dict[str, Any]]]:
    """Every label's score, row by row, each row on its own."""
    import torch

    found = []
    for row in rows:
        batch = adapted.processor(row["text"], return_tensors="pt")
        with torch.no_grad():
            shares = adapted.model.eval()(**batch).logits.softmax(-1)[0].tolist()
        found.append([{"label": name, "score": share} for name, share in zip(tiny.LABELS, shares, strict=True)])
    return found
