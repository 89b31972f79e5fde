"""One trainer for every strategy and task: transformers.Trainer at its documented hooks.

What it adds: defaults that work, early stopping and best weights, the task's own loss, metrics and batches, a stop
before the step on numbers that are not finite, and checkpoints that hold the adapter alone and appear whole or not
at all.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
import transformers
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from adapters import checkpoints, data, finite, locks, manifest, pace, quantize, runs, storage, vocabulary
from adapters.arguments import PATIENCE, changed, complaints, settings
from adapters.contracts import Adapted, Draw
from adapters.epochs import Epochs, ordered
from adapters.errors import NumbersError, RequestError, message, nearest
from adapters.formats import arrange
from adapters.order import frozen_below
from adapters.predict import is_prepared
from adapters.stops import EarlyStopping, Stops

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


@final
class Trainer(transformers.Trainer):
    """transformers.Trainer for an `Adapted`; callbacks, report_to, compute_metrics and TrainingArguments keep working.

    Args:
        adapted: what `adapt` or `load` returned.
        args: `TrainingArguments`, a dict taken literally (also "early_stopping_patience" and "frozen_dropout"), or
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
        self._data: dict[str, dict[str, Any]] = {}
        if isinstance(train_dataset, IterableDataset):  # a stream holds model inputs
            adapted.record.data = self._data["data"] = data.fingerprint_of_stream(train_dataset)
        elif train_dataset is not None:
            rows = self._rows_of(train_dataset)
            adapted.record.data = self._data["data"] = data.fingerprint(rows)
            train_dataset = self._inputs(rows)
            task = task.with_data(rows)
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: self._validation(part, f".{name}") for name, part in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._validation(eval_dataset)
        self.task = adapted.record.task = task
        self._draw = Draw(arguments.seed)
        self._draws = others.get("data_collator") is None
        others.setdefault(
            "data_collator", functools.partial(task.collate, model=adapted.model, processor=adapted.processor)
        )
        others.setdefault("compute_loss_func", task.loss)
        others.setdefault("compute_metrics", self._metrics)
        others.setdefault("processing_class", adapted.processor)
        self.keep = arguments.save_total_limit
        arguments.save_total_limit = None  # rotation is ours: it deletes nothing that this run did not write
        with quantize.accepted(adapted.model), complaints():
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
        self._best: dict[str, torch.Tensor] | None = None
        self._stage: Path | None = None
        self._run = secrets.token_hex(8)
        optimizers, handler = others.get("optimizers", (None, None)), self.callback_handler
        self._terms = functools.partial(
            runs.terms, adapted, self.args, self._data, handler, own=own, optimizers=optimizers
        )
        self._override: tuple[str, ...] = ()
        self._progress: dict[str, Any] = {}
        self.stops = Stops("trainer.train(resume_from_checkpoint=True)")
        self._batch_rows: list[int] | None = None
        self._evaluated: Any = None
        self._summed = torch.zeros(2, dtype=torch.float64)
        self.epochs = Epochs(self._draw)
        self.add_callback(self.epochs)
        patience = own.get("early_stopping_patience", PATIENCE)
        stops_already = any(isinstance(c, EarlyStoppingCallback) for c in self.callback_handler.callbacks)
        if eval_dataset is None:
            if train_dataset is not None:
                self._say("no eval_dataset: no early stopping, the last weights are kept")
        elif patience is not None and not stops_already:
            self.add_callback(EarlyStopping(early_stopping_patience=int(patience)))
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

    def _validation(self, source: Any, name: str = "") -> Dataset:
        rows = self._rows_of(source)
        self._data[f"validation_data{name}"] = data.fingerprint(rows)
        return self._inputs(rows)

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
        self.data_collator = functools.partial(plain, draw=self._draw) if self._draws else plain
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' choice, in an order that seed and epoch alone decide."""
        return ordered(super()._get_train_sampler(*args, **kwargs), self.args, self._draw)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' loop; the task's metrics need the rows, and its loss is a mean over items, not over rows."""
        self._evaluated = dataloader.dataset
        self._summed = torch.zeros(2, dtype=torch.float64)
        result = super().evaluation_loop(dataloader, *args, **kwargs)
        summed = self._summed
        if self.args.world_size > 1:
            summed = self.accelerator.reduce(summed.float().to(self.args.device)).cpu()
        total, items = summed.tolist()
        if items and result.metrics is not None:
            result.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = total / items
        return result

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

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' batches of a step; counted, so that a resumed run finds its place in a stream."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.epochs.batches += len(batches)
        return batches, items

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
        return super().compute_loss(model, inputs, *args, **kwargs)

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
        vocabulary.hold_the_rest(self.adapted)
        if self.accelerator.sync_gradients and getattr(self.accelerator, "scaler", None) is None:
            finite.check_gradients(model, self._where())
        return loss

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """transformers' choice, without tensors that only grew: decay would move the entries that do not train."""
        names: list[str] = super().get_decay_parameter_names(model)
        grown = vocabulary.grown(self.adapted)
        return [name for name in names if name not in grown]

    def _where(self) -> str:
        rows = f", rows {', '.join(map(str, self._batch_rows[:16]))}" if self._batch_rows else ""
        return f"step {self.state.global_step + 1}, epoch {self.state.epoch or 0:.2f}{rows}"

    # ------------------------------------------------------------------ the run

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        override: Sequence[str] = (),
        **kwargs: Any,
    ) -> Any:
        """Train; ends with the best weights of the validation rows in the model.

        Ctrl-C and SIGTERM save a checkpoint at the end of the step and stop; a second one stops at once.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest whole one in the output folder. What is
                different from the run that wrote it is refused.
            override: what is meant to be different, by the names that the refusal lists ("learning_rate").
            args, kwargs: what transformers' `train` takes.

        Raises:
            NumbersError: a loss or gradient is not finite.
            FolderError: nothing to resume from, a damaged checkpoint, another process that writes there, a full disk.
            RequestError: the checkpoint is another run's.
        """
        runs.refuse_many_processes(self.args)
        run = Path(str(self.args.output_dir))
        self._best, self._override = None, tuple(override)
        with contextlib.ExitStack() as stack:
            if self.args.should_save:
                stack.enter_context(locks.held(run / ".lock", str(run)))
                checkpoints.recover(run)
            self.epochs.start(0, 0)
            folder = None
            if resume_from_checkpoint:
                asked = (resume_from_checkpoint, run, self._terms(), self._override)
                folder = runs.checkpoint(*asked, self.adapted.fingerprint, runs.needed(self.accelerator))
            self.pop_callback(self.stops)
            self.add_callback(self.stops)  # the last to say whether a step is saved
            stack.enter_context(self.stops.watched())
            if folder is not None and runs.finished(folder, self._override):
                result = self._nothing_left(folder)
            else:
                result = super().train(str(folder) if folder else None, *args, **kwargs)
                result = result._replace(training_loss=result.metrics["train_loss"])
            if self.stops.number:
                self._save_checkpoint(self.model, None)
                self.stops.stop(self.state.global_step)
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
        if self._best is not None:
            storage.put(self.adapted, self._best, "best weights")
        self._best = None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """transformers' log; the mean loss at the end is over all steps, those before a resume too."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)

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
        place = run / f"checkpoint-{self.state.global_step}"
        best = run / f"checkpoint-{self.state.best_global_step}"
        progress = {  # what transformers' state does not hold: the losses since the last log, the place in a stream
            "losses": [float(self._tr_loss), self._total_loss_scalar, self._globalstep_last_logged],
            "position": [self._draw.epoch, self.epochs.batches],
        }
        facts = {"run": self._run, "terms": self._terms(), "progress": progress}
        try:
            with checkpoints.staged(place, facts) as self._stage:
                super()._save_checkpoint(model, trial)
                known = best == place or checkpoints.run_of(best) == self._run
                self.state.best_model_checkpoint = str(best) if known else None
                runs.write_state(self._stage / place.name, self.state, self._best)
        finally:
            self._stage = None
        checkpoints.rotate(run, self._run, self.keep, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        kept = checkpoints.read(folder)
        self._run, self._progress = kept["run"], kept["progress"]
        self.epochs.start(*self._progress["position"])
        storage.put(self.adapted, manifest.read_tensors(folder, manifest.read_manifest(folder)), str(folder))
        self._best = runs.best_weights(folder)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """transformers' position in the data; a stream may have ended and begun again."""
        position: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        return self.epochs.first if isinstance(self.train_dataset, IterableDataset) else position

    def _load_callback_state(self) -> None:
        with runs.own_patience(self.callback_handler):
            super()._load_callback_state()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._override:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        steps = self.state.global_step
        runs.retune(self.optimizer, self.lr_scheduler, Path(checkpoint), self._override, self.args, steps)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The random state, and with it the loss that was summed up since the last log."""
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            summed, self._total_loss_scalar, self._globalstep_last_logged = self._progress["losses"]
            self._tr_loss = torch.tensor(summed, device=self.args.device)
            # When to log and to save is this run's affair.
            self.state.compute_steps(self.args, self.state.max_steps)  # type: ignore[no-untyped-call]

    def _nothing_left(self, folder: Path) -> TrainOutput:
        """What `train` ends with where no step is left."""
        self._load_from_checkpoint(str(folder))
        self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        self._total_loss_scalar = sum(self._progress["losses"][:2])
        loss = self._total_loss_scalar / max(self.state.global_step, 1)
        metrics = {"train_loss": loss, "train_runtime": 0.0}
        if not any("train_loss" in entry for entry in self.state.log_history):
            self.log(metrics)
        return TrainOutput(self.state.global_step, loss, metrics)
