"""Runs whose model is divided over processes by FSDP, and the same in one process, as plain data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import adapters
from adapters import ranks, sharded
from adapters.manifest import read_manifest, read_tensors

QUIET = {"disable_tqdm": True, "report_to": "none", "logging_steps": 1, "prefix_cache": False}
BATCH = 6  # rows of a step, over all processes
# name -> family, head, strategy, options
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "bert full": ("bert", tiny.CLASSIFICATION, "full", {}),
    "bert freeze": ("bert", tiny.CLASSIFICATION, "freeze", {}),
    "bert lora": ("bert", tiny.CLASSIFICATION, "lora", {}),
    "bert bitfit": ("bert", tiny.CLASSIFICATION, "bitfit", {}),
    "bert probe": ("bert", tiny.CLASSIFICATION, "probe", {}),
    "bert ia3": ("bert", tiny.CLASSIFICATION, "ia3", {}),
    "bert dora": ("bert", tiny.CLASSIFICATION, "dora", {}),
    "gpt2 full": ("gpt2", "AutoModelForCausalLM", "full", {}),
    "llama lora": ("llama", "AutoModelForCausalLM", "lora", {}),
    "t5 lora": ("t5", tiny.CLASSIFICATION, "lora", {}),
    "vit full": ("vit", "AutoModelForImageClassification", "full", {}),
}


def adapted(case: str, dtype: Any = None, **more: Any) -> Any:
    family, auto, strategy, options = CASES[case]
    still = {"attention_dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    still |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout_rate": 0.0}
    known = vars(tiny.config(family))
    net = tiny.model(family, auto=auto, dtype=dtype, **{name: 0.0 for name in still if name in known})
    if auto == "AutoModelForCausalLM":
        options = {**options, "task": "causal-lm"}
    else:
        options = {**options, "labels": list(tiny.LABELS)}
    return adapters.adapt(net, strategy, processor=tiny.processor(family), **options, **more)


def rows(case: str, n: int, seed: int = 0) -> Any:
    found = tiny.rows(n, seed=seed)
    if CASES[case][0] == "vit":
        from PIL import Image

        draw = torch.Generator().manual_seed(seed)
        values = torch.randint(0, 256, (n, 16, 16, 3), generator=draw, dtype=torch.uint8).numpy()
        return [{"image": Image.fromarray(v), "label": row["label"]} for v, row in zip(values, found, strict=True)]
    if CASES[case][1] == "AutoModelForCausalLM":
        return [{"text": row["text"]} for row in found]
    return found


def trainer(folder: str, case: str, one: Any = None, **args: Any) -> adapters.Trainer:
    count = ranks.count()
    given: dict[str, Any] = {"output_dir": folder, **QUIET, "learning_rate": 1e-2, "num_train_epochs": 1}
    given |= {"per_device_train_batch_size": BATCH // count, "optim": "sgd", "warmup_steps": 0, "max_grad_norm": 0.5}
    given |= {"lr_scheduler_type": "constant", "save_strategy": "no", "warm_head": False, "chunked_loss": False}
    given |= {"fsdp": True} if count > 1 else {}
    return adapters.Trainer(one or adapted(case), given | args, rows(case, 24), rows(case, 7, seed=1))


def told(found: adapters.Trainer, folder: Path) -> dict[str, Any]:
    """Losses, metrics, and what was saved."""
    adapters.save(found.adapted, folder) if ranks.count() > 1 or ranks.first() else None
    log = [{n: v for n, v in entry.items() if "loss" in n or "accuracy" in n} for entry in found.state.log_history]
    tensors = read_tensors(folder, read_manifest(folder))
    return {
        "log": [entry for entry in log if entry],
        "state": {name: tensor.double().flatten().tolist() for name, tensor in tensors.items()},
        "dtypes": {name: str(tensor.dtype) for name, tensor in tensors.items()},
        "divided": sharded.is_divided(found.adapted),
        "model": read_manifest(folder)["backbone"]["model_class"],
    }


def learnt(folder: str, cases: list[str], args: dict[str, Any] | None = None) -> dict[str, Any]:
    ranks.join()
    given = {}
    for case in cases:
        place = Path(folder) / case.replace(" ", "-")
        one = trainer(str(place), case, **(args or {}))
        one.train()
        given[case] = told(one, place / "adapter")
    return given
