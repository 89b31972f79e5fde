"""The training settings of a run as data: which there are, which hold still, and what is wrong with some given ones.

Nothing of torch or transformers is imported to tell; `arguments` makes transformers' object of them.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import Any

from adapters import installed
from adapters.errors import message, nearest, unquoted

OWN = {
    "early_stopping_patience": "evaluations without improvement before training stops; None trains to the end",
    "frozen_dropout": "keep dropout on in the frozen part: below the lowest trained module, and in blocks of which "
    "nothing but adapters trains",
    "fused": "each adapted matmul as one function while training, and the blocks' products in bfloat16 on hardware "
    "that has it: true, false for neither, or 'float32' for the first alone (bf16=False in a dict of args is the same)",
    "prefix_cache": "keep what the frozen part below the lowest trained module computes: true, false, or 'bfloat16'",
    "prefix_cache_gb": "GB on disk that what is kept of all runs may take; 0 for memory only; null for the smaller of "
    "10 and a tenth of what is free",
    "warm_head": "a new output layer starts solved on the features of the frozen backbone: true, false; null where "
    "the validation rows say that it helps",
    "warm_learning_rate": "learning_rate of a run whose new output layer starts solved; where learning_rate is set and "
    "this is not, the same",
    "shuffle_buffer": "raw rows of a stream that each reader mixes; 0 leaves them in its order; null for 1000, or 0 "
    "where the stream holds model inputs",
    "chunked_loss": "a language model's loss without all of a batch's logits: true, false; null where they are large",
}
ALIASES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "warmup_ratio": "warmup_steps (a number below 1 is a share)",
    "group_by_length": "train_sampling_strategy",
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "lr_scheduler": "lr_scheduler_type",
}

_SMALLER = "It would cast the trained weights. Load the backbone in fewer bits: load={'dtype': 'bfloat16'}."
_PUSH = "Push the finished folder: huggingface_hub.upload_folder(...)."
_WHOLE = "The task measures all rows at once; a compute_metrics of your own may ask for it."
_TEXTS = "Only transformers.Seq2SeqTrainer reads it."
# Fields that would do nothing here, or break what is promised: the one value that holds, and what to do instead.
SETTLED: Mapping[str, tuple[object, str]] = {
    "label_smoothing_factor": (0, "Say it as the task's own option label_smoothing."),
    "label_names": (None, "The task names the labels."),
    "remove_unused_columns": (False, "The task chooses what reaches the model."),
    "length_column_name": ("length", "The task counts the lengths."),
    "dataloader_drop_last": (False, "Every row is trained on and measured."),
    "dataloader_persistent_workers": (
        False,
        "Workers that outlive an epoch would draw the same random rows in every one.",
    ),
    "dataloader_in_order": (True, "Batches in the order in which workers finish are others in every run."),
    "ignore_data_skip": (False, "A resumed run goes on at the row where it stopped."),
    "restore_callback_states_from_checkpoint": (True, "A resumed run goes on counting its patience."),
    "logging_nan_inf_filter": (False, "Numbers that are not finite stop the run."),
    "load_best_model_at_end": (True, "The best weights are put back; without an eval_dataset the last ones stay."),
    "auto_find_batch_size": (
        False,
        "Give a smaller per_device_train_batch_size; with gradient_accumulation_steps the gradient is the same.",
    ),
    "average_tokens_across_devices": (True, "The loss is a mean over the items of all processes."),
    "ddp_broadcast_buffers": (None, "Buffers hold still; nothing is sent for them."),
    "ddp_find_unused_parameters": (None, "What no loss reaches keeps nobody waiting, and stays as it is."),
    "ddp_static_graph": (None, "No pass through the model holds an exchange."),
    "fp16_full_eval": (False, _SMALLER),
    "bf16_full_eval": (False, _SMALLER),
    "enable_jit_checkpoint": (False, "Say save_strategy and save_steps, and go on with resume_from_checkpoint."),
    "resume_from_checkpoint": (None, "Say it to train: trainer.train(resume_from_checkpoint=...), or --resume."),
    "push_to_hub": (False, _PUSH),
    "hub_model_id": (None, _PUSH),
    "hub_strategy": ("every_save", _PUSH),
    "hub_always_push": (False, _PUSH),
    "hub_revision": (None, _PUSH),
    "batch_eval_metrics": (False, _WHOLE),
    "eval_do_concat_batches": (True, _WHOLE),
    "include_for_metrics": ([], _WHOLE),
    "predict_with_generate": (False, _TEXTS),
    "sortish_sampler": (False, _TEXTS),
    "generation_max_length": (None, _TEXTS),
    "generation_num_beams": (None, _TEXTS),
    "generation_config": (None, _TEXTS),
}
SAMPLING = ("group_by_length", "random", "sequential", "batch_rebalance")
WATCHING = ("reduce_lr_on_plateau", "greedy")  # schedules that follow the metric of the best weights
COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
LOOSE = ("fsdp",)  # transformers takes more kinds than it says
# Loggers that `report_to` may name -> a package of each, where its import name is another.
REPORTERS = {
    **{name: (name,) for name in ("comet_ml", "dagshub", "dvclive", "mlflow", "neptune", "wandb", "codecarbon")},
    **{name: (name,) for name in ("clearml", "swanlab", "trackio", "kubeflow")},
    "tensorboard": ("tensorboard", "tensorboardX"),
    "azure_ml": ("azureml",),
}


def faults(given: Mapping[str, Any], *, own_metrics: bool = False, literal: bool = True) -> list[str]:
    """Everything that is wrong with training settings: names, kinds, values, and what excludes each other.

    Args:
        given: names and values.
        own_metrics: the caller computes metrics.
        literal: the values are as someone wrote them, not as transformers made them.
    """
    known = {*installed.settings(), *OWN}
    found = []
    for name, value in given.items():
        holds, remedy = SETTLED.get(name, (value, ""))
        if name not in known and name not in SETTLED:
            right = ALIASES.get(name)
            remedy = f"The name is {right}." if right else nearest(name, known)
            found.append(message(f"unknown training setting {name!r}", where="args", remedy=remedy))
        elif name in SETTLED and value != holds and not (own_metrics and remedy == _WHOLE):
            what = "this setting is fixed here"
            where = f"args: {name}"
            found.append(message(what, where=where, expected=repr(holds), found=repr(value), remedy=remedy))
        elif name not in SETTLED:
            found += _value_faults(name, value, literal=literal)
    return found + _contradictions(given)


def _contradictions(given: Mapping[str, Any]) -> list[str]:
    """Settings that cannot stand together."""
    found = []
    for kind in ("eval", "save", "logging"):
        chosen = str(getattr(given.get(f"{kind}_strategy"), "value", given.get(f"{kind}_strategy", "steps")))
        if given.get(f"{kind}_steps") is not None and chosen != "steps":
            shown = f"{kind}_strategy {chosen!r}"
            found.append(
                message(f"{kind}_steps beside another strategy", where="args", expected="'steps'", found=shown)
            )
    if given.get("greater_is_better") is not None and given.get("metric_for_best_model") is None:
        remedy = "Say metric_for_best_model as well."
        found.append(message("greater_is_better without its metric", where="args", remedy=remedy))
    if given.get("fp16") is True and given.get("bf16") is True:
        remedy = "Say one of them; bf16 where the hardware has it."
        found.append(message("two precisions at once", where="args: fp16, bf16", remedy=remedy))
    return found


def _value_faults(name: str, value: Any, *, literal: bool) -> list[str]:
    """What is wrong with a value, told from the kind of transformers' field and the settings' plain limits."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name == "early_stopping_patience":
        fine = value is None or (number and isinstance(value, int) and value > 0)
        expected = "a whole number > 0, or null"
    elif name == "frozen_dropout":
        fine, expected = isinstance(value, bool), "true or false"
    elif name == "fused":
        fine, expected = isinstance(value, bool) or value == "float32", "true, false or 'float32'"
    elif name in ("chunked_loss", "warm_head"):
        fine, expected = value is None or isinstance(value, bool), "true, false or null"
    elif name == "shuffle_buffer":
        fine = value is None or (number and isinstance(value, int) and value >= 0)
        expected = "a whole number from 0, or null"
    elif name == "prefix_cache_gb":
        fine = value is None or (number and value >= 0)
        expected = "a number from 0, or null"
    elif name == "prefix_cache":
        fine, expected = isinstance(value, bool) or value == "bfloat16", "true, false or 'bfloat16'"
    elif name == "train_sampling_strategy":
        fine, expected = value in SAMPLING, f"one of {', '.join(SAMPLING)}"
    elif name == "use_liger_kernel":
        fine = not value or importlib.util.find_spec("liger_kernel") is not None
        expected = "the package liger-kernel, which is not installed"
    elif name == "report_to":
        wanted = [value] if isinstance(value, str) else value
        fine = wanted is None or (isinstance(wanted, list | tuple) and all(map(_reports, wanted)))
        expected = f"of what is installed: {', '.join([*filter(_reports, REPORTERS), 'none'])}"
    elif name in COUNTS:
        fine, expected = number and isinstance(value, int) and value > 0, "a whole number > 0"
    elif name in ("learning_rate", "warm_learning_rate"):
        fine, expected = number and 0 < value < math.inf, "a number > 0: with 0 nothing would train"
    else:
        setting = installed.settings()[name]
        fine, expected = (
            not literal or name in LOOSE or setting.fits(getattr(value, "value", value)),
            setting.expected(),
        )
    if fine:
        return []
    remedy = unquoted(value)
    if not remedy and isinstance(value, str) and name in installed.settings() and installed.settings()[name].choices:
        remedy, expected = nearest(value, installed.settings()[name].choices), ""
    return [message("a wrong value", where=f"args: {name}", expected=expected, found=repr(value), remedy=remedy)]


def _reports(name: Any) -> bool:
    """Whether a logger of `report_to` has one of its packages here."""
    if name in ("all", "none"):
        return True
    return any(importlib.util.find_spec(package) is not None for package in REPORTERS.get(str(name), ()))
