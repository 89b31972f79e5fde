"""One trainer for every strategy and task: transformers.Trainer at its documented hooks.

What it adds: defaults that work, early stopping and best weights, the task's own loss, metrics and batches, a stop
before the step on numbers that are not finite, and checkpoints that hold the adapter alone and appear whole or not
at all.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

import torch
import transformers
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from adapters import checkpoints, data, finite, manifest, pace, prefix, shards, storage
from adapters.anatomy import own_name
from adapters.arguments import PATIENCE, changed, complaints, settings
from adapters.contracts import Adapted, Draw
from adapters.errors import FolderError, NumbersError, RequestError, message, nearest
from adapters.formats import arrange
from adapters.order import frozen_below
from adapters.predict import is_prepared

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

OPTIMIZER = "optimizer.pt"  # in a checkpoint, unless save_only_model left it out


@final
class Trainer(transformers.Trainer):
    """transformers.Trainer for an `Adapted`; callbacks, report_to, compute_metrics and TrainingArguments keep working.

    Args:
        adapted: what `adapt` or `load` returned.
        args: `TrainingArguments`, a dict taken literally (also what `arguments.OWN` names), or
            None for the strategy's defaults in a fresh folder under `runs/`.
        train_dataset, eval_dataset: raw rows in any form, or prepared model inputs; `eval_dataset` may be a dict.
        columns: task column -> source column.
        **others: what transformers.Trainer takes, by name.

    Raises:
        RequestError: an unknown setting.
        DataError: rows that the task cannot take.
    """

    def __init__(
        self,
        adapted: Adapted,
        args: TrainingArguments | Mapping[str, Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        columns: Mapping[str, str] | None = None,
        **others: Any,
    ) -> None:
        adapted.state()  # a spent adapter speaks here
        self.adapted = adapted
        self.columns = columns
        self.remarks: list[str] = []
        self._own_metrics = own_metrics = others.get("compute_metrics") is not None
        parts = tuple(eval_dataset) if isinstance(eval_dataset, Mapping) else ()
        arguments, own = settings(
            adapted, args, evaluated=eval_dataset is not None, own_metrics=own_metrics, parts=parts
        )
        task = adapted.task
        if train_dataset is not None:
            rows = self._rows_of(train_dataset)
            adapted.record.data = data.fingerprint(rows)
            train_dataset = self._inputs(rows)
            task = task.with_data(rows)
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: self.prepared(part) for name, part in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self.prepared(eval_dataset)
        self.task = adapted.record.task = task
        self._draw = Draw(arguments.seed) if others.get("data_collator") is None else None
        others.setdefault(
            "data_collator", functools.partial(task.collate, model=adapted.model, processor=adapted.processor)
        )
        others.setdefault("compute_loss_func", task.loss)
        others.setdefault("compute_metrics", self._metrics)
        others.setdefault("processing_class", adapted.processor)
        self.keep = arguments.save_total_limit
        arguments.save_total_limit = None  # rotation is ours: it deletes nothing that this run did not write
        with _accepted(adapted.model), complaints():
            super().__init__(
                model=adapted.model,
                args=arguments,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                **others,
            )
        # The loss comes from the task alone, so the models' own normalisation by item counts stays out of it.
        self.model_accepts_loss_kwargs = False
        self._loss_shifts_labels = False
        self.label_smoother = None
        trained = adapted.trained
        self._quiet = frozen_below(adapted.model, trained)
        if own.get("frozen_dropout"):
            self._quiet = [m for m in self._quiet if getattr(m, "running_mean", None) is not None]
        self._paces = adapted.strategy.paces(adapted.model, trained)
        if train_dataset is not None:
            pace.check_run(self._paces, self.args, own_optimizer=self.optimizer is not None)
            self.add_callback(pace.Joining(self._paces))
        self._own = own
        self._prefix: prefix.Prefix | None = None
        self._best: dict[str, torch.Tensor] | None = None
        self._stage: Path | None = None
        self._run = secrets.token_hex(8)
        self._batch_rows: list[int] | None = None
        self._evaluated: Any = None
        self._summed = torch.zeros(2, dtype=torch.float64)
        if self._draw is not None:
            self.add_callback(_Epochs(self._draw))
        patience = own.get("early_stopping_patience", PATIENCE)
        stops_already = any(isinstance(c, EarlyStoppingCallback) for c in self.callback_handler.callbacks)
        if eval_dataset is None:
            if train_dataset is not None:
                self._say("no eval_dataset: no early stopping, the last weights are kept")
        elif patience is not None and not stops_already:
            self.add_callback(_EarlyStopping(early_stopping_patience=int(patience)))
        adapted.record.settings = changed(arguments) | own

    # ------------------------------------------------------------------ rows

    def _rows_of(self, source: Any) -> Dataset:
        if is_prepared(source):
            rows: Dataset = source
            return rows
        rows, remark = arrange(data.one(source), self.columns, self.adapted.task.columns)
        if remark:
            logger.info(remark)
        return rows

    def prepared(self, source: Any) -> Dataset:
        """Model inputs from raw rows in any form; what is prepared already stays as it is."""
        return self._inputs(self._rows_of(source))

    def _inputs(self, rows: Dataset) -> Dataset:
        if is_prepared(rows):
            return rows
        prepared, remarks = self.adapted.task.prepare(rows, self.adapted.processor, self.adapted.model, labelled=True)
        for remark in remarks:
            self._say(remark)
        return prepared

    def _say(self, remark: str) -> None:
        if remark not in self.remarks:
            self.remarks.append(remark)
            logger.warning(remark)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics over raw or prepared rows (the eval_dataset unless given), with the prefix transformers gives."""
        if eval_dataset is not None and not (isinstance(eval_dataset, str) or is_prepared(eval_dataset)):
            if isinstance(eval_dataset, Mapping):
                eval_dataset = {name: self.prepared(part) for name, part in eval_dataset.items()}
            else:
                eval_dataset = self.prepared(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def get_train_dataloader(self) -> Any:
        """Batches of the training rows, with what is random about a row drawn anew in every epoch."""
        plain: Any = self.data_collator
        if self._draw is not None:
            self.data_collator = functools.partial(plain, draw=self._draw)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' loop; the task's metrics need the rows, and its loss is a mean over items, not over rows."""
        self._evaluated = dataloader.dataset
        self._summed = torch.zeros(2, dtype=torch.float64)
        result = super().evaluation_loop(dataloader, *args, **kwargs)
        total, items = self._gathered_sums()
        if items and result.metrics is not None:
            result.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = total / items
        return result

    def _gathered_sums(self) -> tuple[float, float]:
        """Loss and items of an evaluation, over all processes."""
        summed = self._summed
        if self.args.world_size > 1:
            summed = self.accelerator.reduce(summed.float().to(self.args.device)).cpu()
        return float(summed[0]), float(summed[1])

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Loss, what the task's metrics need, and the rows' numbers; a caller's own metrics get logits and labels."""
        if self._own_metrics or prediction_loss_only or "row" not in inputs or "labels" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        numbers = torch.as_tensor(inputs["row"], device=self.args.device)
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, dict(batch), return_outputs=True)
            found = self.task.measured(outputs, batch, self.adapted.model, self.adapted.processor)
        items = self.task.items(batch["labels"])
        self._summed += torch.tensor([float(loss) * items, items], dtype=torch.float64)
        return loss.detach(), tuple(part.contiguous() for part in found), numbers

    def _metrics(self, found: Any) -> dict[str, float]:
        parts = found.predictions if isinstance(found.predictions, tuple) else (found.predictions,)
        place = {number: position for position, number in enumerate(self._evaluated["row"])}
        back = sorted(range(len(found.label_ids)), key=lambda index: place[int(found.label_ids[index])])
        return self.task.metrics([part[back] for part in parts], self._evaluated, self.adapted.processor)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """transformers' optimizer, its groups divided by the strategy's rates."""
        fresh = self.optimizer is None
        if fresh:
            pace.let_join(self.adapted.model, self._paces, float("inf"))  # an earlier run may have broken off
        optimizer = super().create_optimizer(model)
        if fresh:
            pace.set_rates(optimizer, self.adapted.model, self._paces)
        return optimizer

    # ------------------------------------------------------------------ steps

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """Loss items of the global batch, as the task counts them."""
        if self.args.world_size > 1 or not batch_samples or "labels" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        return max(1, sum(self.task.items(batch["labels"]) for batch in batch_samples))

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The task's loss, with the frozen part below the lowest trained module in eval mode."""
        if model.training:
            for module in self._quiet:
                module.training = False
        with self._prefix.given(inputs) if self._prefix is not None else contextlib.nullcontext():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _kept_prefix(self) -> prefix.Prefix | None:
        """The frozen prefix of all rows, where they pass more than once and it never changes."""
        draw, args, collate = self._draw, self.args, cast("Any", self.data_collator)
        wanted = self._own.get("prefix_cache", True)
        once = args.max_steps <= 0 and args.num_train_epochs < 2
        if not wanted or once or draw is None or args.world_size > 1 or args.n_gpu > 1:
            return None
        parts = self.eval_dataset.values() if isinstance(self.eval_dataset, Mapping) else [self.eval_dataset]
        request = prefix.Request(
            sets=[self.train_dataset, *(part for part in parts if part is not None)],
            collate=lambda rows, training: collate(rows, draw=draw) if training else collate(rows),
            redraw=lambda epoch: setattr(draw, "epoch", epoch),
            dtype=torch.bfloat16 if wanted == "bfloat16" else None,
            device=args.device,
            noisy=bool(self._own.get("frozen_dropout")),
        )
        self._move_model_to_device(self.adapted.model, args.device)
        with self.compute_loss_context_manager():
            found, remark = prefix.kept(self.adapted.model, self.adapted.trained, request)
        if remark:
            self._say(remark)
        return found

    def _prepare_inputs(self, inputs: Any) -> Any:
        self._batch_rows = inputs.get("row")
        return super()._prepare_inputs({name: value for name, value in inputs.items() if name != "row"})

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass; stops before the optimizer step where numbers are not finite.

        Raises:
            NumbersError: naming step, rows and the first layer at fault; the weights are those of the last step.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            layer = finite.first_at_fault(model, lambda: self.compute_loss(model, self._prepare_inputs(inputs)))
            raise NumbersError(
                message(
                    f"the loss is {float(loss)}",
                    where=self._where(),
                    found=f"values that are not finite, first in {layer or 'the loss itself'}",
                    remedy="No step was taken. Look at these rows, or take a smaller learning rate.",
                )
            )
        self._only_added_entries()
        if self.accelerator.sync_gradients and getattr(self.accelerator, "scaler", None) is None:
            finite.check_gradients(model, self._where())
        return loss

    def _only_added_entries(self) -> None:
        """Of tensors that grew with added tokens only the added entries train."""
        vocabulary = self.adapted.vocabulary
        for name, parameter in self.adapted.model.named_parameters() if vocabulary is not None else ():
            if vocabulary is not None and own_name(name) in vocabulary.axes and parameter.grad is not None:
                others = torch.ones(parameter.shape[0], dtype=torch.bool, device=parameter.device)
                others[list(vocabulary.ids)] = False
                parameter.grad[others] = 0

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """transformers' choice, without tensors that only grew: decay would move the entries that do not train."""
        names: list[str] = super().get_decay_parameter_names(model)
        axes = self.adapted.vocabulary.axes if self.adapted.vocabulary is not None else {}
        return [name for name in names if own_name(name) not in axes]

    def _where(self) -> str:
        rows = f", rows {', '.join(map(str, self._batch_rows[:16]))}" if self._batch_rows else ""
        return f"step {self.state.global_step + 1}, epoch {self.state.epoch or 0:.2f}{rows}"

    # ------------------------------------------------------------------ the run

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; ends with the best weights of the validation rows in the model.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest whole one in the output folder.

        Raises:
            NumbersError: a loss or gradient is not finite.
            FolderError: nothing to resume from, or a damaged checkpoint.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(checkpoints.newest(Path(str(self.args.output_dir))))
        self._best = None
        self._prefix = self._kept_prefix()
        result = super().train(resume_from_checkpoint or None, *args, **kwargs)
        self._restore_best()
        record = self.adapted.record
        record.notes += [remark for remark in self.remarks if remark not in record.notes]
        record.metrics["train"] = {
            "loss": float(result.training_loss),
            "epochs": float(self.state.epoch or 0),
            "steps": int(self.state.global_step),
            "seconds": round(float(result.metrics.get("train_runtime", 0.0)), 2),
        }
        if self.state.best_metric is not None:
            record.metrics["validation"] = {str(self.args.metric_for_best_model): float(self.state.best_metric)}
        return result

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = str(self.args.metric_for_best_model)
        known = [found.removeprefix("eval_") for found in metrics]
        if self.args.metric_for_best_model is not None and name.removeprefix("eval_") not in known:
            remedy = nearest(name.removeprefix("eval_"), known)
            raise RequestError(message("no such metric", where=f"metric_for_best_model {name!r}", remedy=remedy))
        better: bool = super()._determine_best_metric(metrics, trial)
        if better:
            self.state.best_global_step = self.state.global_step
            self._best = {name: tensor.clone() for name, tensor in self.adapted.state().items()}
        return better

    def _restore_best(self) -> None:
        """The best weights: those kept in memory, or, after a resume that found no better ones, the checkpoint's."""
        if self._best is not None:
            storage.put(self.adapted, self._best, "best weights")
        elif self.state.best_model_checkpoint is not None:
            folder = Path(self.state.best_model_checkpoint)
            storage.put(self.adapted, manifest.read_tensors(folder, manifest.read_manifest(folder)), str(folder))
        self._best = None

    # ------------------------------------------------------------------ checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._stage) if self._stage is not None else super()._get_output_dir(trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        if self._stage is not None and folder.parent == self._stage:
            folder.mkdir()
            storage.write(self.adapted, folder)
        else:
            storage.save(self.adapted, folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside its place, give it a manifest, then move it there in one step."""
        run = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        final_place = run / name
        best_step = self.state.best_global_step
        known_best = self.state.best_model_checkpoint
        stage = run / f".staging-{os.getpid()}"
        shards.remove(stage)
        stage.mkdir(parents=True)
        self._stage = stage
        try:
            super()._save_checkpoint(model, trial)
            self.state.best_model_checkpoint = str(run / f"checkpoint-{best_step}") if best_step else known_best
            state_file = stage / name / "trainer_state.json"
            state_file.unlink()
            self.state.save_to_json(str(state_file))
            checkpoints.seal(stage / name, self._run)
            shards.remove(final_place) if checkpoints.run_of(final_place) else None
            (stage / name).rename(final_place)
            shards.sync_folder(run)
        finally:
            self._stage = None
            shards.remove(stage)
        checkpoints.rotate(run, self._run, self.keep, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        checkpoints.verify(folder)
        if not (folder / OPTIMIZER).is_file():
            raise FolderError(
                message(
                    "the checkpoint holds no optimizer: training cannot go on as if nothing had been",
                    where=str(folder),
                    expected=OPTIMIZER,
                    remedy="Write checkpoints without save_only_model, or load this one as an adapter.",
                )
            )
        document = manifest.read_manifest(folder)
        manifest.refuse_other_backbone(document, self.adapted.fingerprint, str(folder))
        storage.put(self.adapted, manifest.read_tensors(folder, document), str(folder))
        self._run = checkpoints.run_of(folder) or self._run


@final
class _Epochs(TrainerCallback):
    """Moves the draw of random rows on with the epochs, before the epoch's batches are made."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The number of whole epochs behind us."""
        self.draw.epoch = int(state.epoch or 0)


@final
class _EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping without its demand that transformers reload the best weights: they are kept here."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing to check: `settings` has chosen the metric."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Count the evaluations that choose the best weights: of several validation sets one does."""
        if f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}" in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _accepted(model: Any) -> Iterator[None]:
    """transformers refuses to train a 4-bit model without a PeftModel around it; ours trains unpacked parts.

    This is the one place where its check is met: what trains is never packed (see `adapt.assemble`).
    """
    if getattr(model, "is_quantized", False) and not getattr(model, "_hf_peft_config_loaded", False):
        model._hf_peft_config_loaded = True
        try:
            yield
        finally:
            del model._hf_peft_config_loaded
    else:
        yield
