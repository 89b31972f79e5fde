"""One law a cell: what trains moves, what is frozen stays, save -> load and merge give the same outputs.

The default run takes a sample that holds every strategy with every task and every backbone with every task; `-m
pairs` all pairs; `-m matrix` every cell. `scripts/matrix` writes docs/matrix.md from a run.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import cells
import pytest
import tiny
import torch

import adapters
from adapters import fidelity
from adapters.anatomy import own_name
from adapters.tasks import TASKS

# Tensors that a few batches rightly leave still: no row reads them, or their gradient is zero by the mathematics.
STILL = re.compile(
    r"position_embeddings|embed_positions|wpe|token_type|token_type_embeddings"  # entries beyond the rows' length
    r"|mask_token"  # DINOv2's, used when patches are hidden
    r"|key\.bias|k_proj\.bias|k_lin\.bias|\.k\.bias"  # softmax ignores what all keys share
    r"|experts|\.gate\."  # experts that no token was sent to
    r"|relative_attention_bias|relative_position_bias_table|rel_embeddings"  # distances that no row has
    r"|pooler"  # a pooler that the head does not read
    r"|final_logits_bias|shared|embed_tokens|word_embeddings|wte"  # words that no row has
)


def pick() -> list[Any]:
    sample, pairs = set(cells.cover(cells.SAMPLE)), set(cells.cover(cells.PAIRS))
    marked = []
    for cell in cells.all_cells():
        marks = [pytest.mark.matrix]
        marks += [pytest.mark.pairs] if cell in pairs else []
        marks += [pytest.mark.sample] if cell in sample else []
        marked.append(pytest.param(cell, id=" ".join(cell), marks=marks))
    return marked


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of small backbones, each made once: language models with their head, all others without."""
    made: dict[tuple[str, str], str] = {}

    def folder(kind: str, task: str) -> str:
        whole = task in ("causal-lm", "seq2seq", "masked-lm", "denoising")
        auto = TASKS[task].auto_class if whole else "AutoModel"
        if (kind, auto) not in made:
            path = tmp_path_factory.mktemp("base") / kind
            made[kind, auto] = tiny.folder(kind, path, auto=auto)
        return made[kind, auto]

    return folder


def outputs(model: Any) -> list[torch.Tensor]:
    return fidelity.outputs(model, [fidelity.synthetic(model)])


def frozen(adapted: adapters.Adapted) -> dict[str, torch.Tensor]:
    """What must stay: all but what trains, and but other names of the same memory (tied weights)."""
    moving = {tensor.data_ptr() for _, tensor, _ in adapted.places()}
    state = adapted.model.state_dict()
    kept = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    return {name: copy.deepcopy(tensor) for name, tensor in kept.items() if tensor.data_ptr() not in moving}


@pytest.mark.parametrize("cell", pick())
def test_cell(cell: cells.Cell, base: Any, tmp_path: Path) -> None:
    import transformers

    strategy, kind, task = cell
    options = cells.OPTIONS.get(strategy, {}) | cells.TASK_OPTIONS.get(task, {})
    said = cells.refusal(cell)
    if said is not None:
        with pytest.raises(adapters.AdaptersError, match=said):
            adapters.adapt(base(kind, task), strategy, task=task, **options)
        return
    # transformers opens its own byte-level tokenizer for Qwen's folders, which does not know these words.
    processor = tiny.tokenizer() if kind.startswith("qwen") else None
    adapted = adapters.adapt(base(kind, task), strategy, task=task, processor=processor, **options)
    start, kept = {key: tensor.clone() for key, tensor in adapted.state().items()}, frozen(adapted)
    arguments = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 3,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    adapters.Trainer(adapted, arguments, cells.rows(task, 18)).train()
    numbers = adapters.evaluate(adapted, cells.rows(task, 6, seed=1))
    assert adapted.task.best_metric[0] in numbers

    now = adapted.state()
    still = {key for key, tensor in start.items() if torch.equal(tensor, now[key])}
    assert not {key for key in still if not STILL.search(own_name(key))}
    assert len(still) < len(start)
    after = adapted.model.state_dict()
    assert not [name for name, tensor in kept.items() if not torch.equal(tensor, after[name])]

    wanted = outputs(adapted.model)
    folder = adapters.save(adapted, tmp_path / "adapter")
    again = outputs(adapters.load(folder).model)
    assert all(torch.equal(one, other) for one, other in zip(wanted, again, strict=True))
    assert len(adapters.predict(adapted, unlabelled(task))) == 3

    adapters.merge_on_disk(folder, tmp_path / "merged", check_logits=False)
    auto = getattr(transformers, adapted.task.auto_class)
    merged, info = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for one, other in zip(wanted, outputs(merged), strict=True):
        assert float((one - other).abs().max()) <= 1e-4 * max(float(one.std()), 1.0)


def unlabelled(task: str) -> list[dict[str, Any]]:
    if task in ("masked-lm", "denoising"):
        return [{"text": "the [MASK] is late"}] * 3
    left_out = {"label", "tags", "answer", "answer_start", "target"}
    return [{k: v for k, v in row.items() if k not in left_out} for row in cells.rows(task, 3, seed=2)]


def test_every_strategy_and_task_and_backbone_is_in_the_matrix() -> None:
    from adapters.adapt import STRATEGIES

    for chosen in (cells.all_cells(), cells.cover(cells.SAMPLE), cells.cover(cells.PAIRS)):
        strategies, kinds, tasks = (set(values) for values in zip(*chosen, strict=True))
        assert strategies == set(STRATEGIES)
        assert kinds == set(tiny.FAMILIES)
        assert tasks == set(TASKS)


def test_the_covers_hold_what_they_promise() -> None:
    for pairs in (cells.SAMPLE, cells.PAIRS):
        for one, other in pairs:
            wanted = {(cell[one], cell[other]) for cell in cells.all_cells()}
            assert {(cell[one], cell[other]) for cell in cells.cover(pairs)} == wanted


def test_every_refusal_is_one_of_a_cell() -> None:
    for *patterns, said in cells.REFUSALS:
        assert any(
            all(re.fullmatch(pattern, part) for pattern, part in zip(patterns, cell, strict=True))
            for cell in cells.all_cells()
        ), said
