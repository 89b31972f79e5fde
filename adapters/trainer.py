"""One trainer for every strategy and task: transformers.Trainer at its documented hooks.

What it adds to what a run learns (see `objective`): early stopping and best weights, a contract that every run is held
to, a stop before the step on numbers that are not finite, and checkpoints that hold the adapter alone, appear whole or
not at all, and are resumed bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from transformers import EarlyStoppingCallback, ProgressCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from adapters import (
    attendance,
    checkpoints,
    checks,
    course,
    exchange,
    facts,
    fidelity,
    finite,
    gauge,
    headstart,
    manifest,
    memory,
    onward,
    pace,
    progress,
    randomness,
    ranks,
    restarts,
    runs,
    storage,
    unison,
    vocabulary,
    witness,
)
from adapters.accord import Accord
from adapters.arguments import PATIENCE, changed
from adapters.contracts import Adapted
from adapters.errors import NumbersError, RequestError, message, nearest
from adapters.journal import Journal
from adapters.modes import evaluating, stepping
from adapters.objective import ObjectiveTrainer
from adapters.predict import is_prepared
from adapters.stops import EarlyStopping, Stops


@final
class Trainer(ObjectiveTrainer):
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
        super().__init__(adapted, args, train_dataset, eval_dataset, columns, **others)
        own = self._own
        self._stage: Path | None = None
        self._random: list[Any] = []  # the state of every process, while a checkpoint is written
        self._run = secrets.token_hex(8)
        optimizers, handler = others.get("optimizers", (None, None)), self.callback_handler
        self._terms = functools.partial(
            runs.terms, adapted, self.args, self._data, handler, own=own, optimizers=optimizers
        )
        self._progress: dict[str, Any] = {}
        self._gauge = gauge.Gauge(self._throughput, lambda: self._course.lately())
        self._bars = self.pop_callback(ProgressCallback) is not None
        if self._bars:
            self.add_callback(self._gauge)
        self.stops = Stops("trainer.train(resume_from_checkpoint=True)", alone=self.args.world_size == 1)
        self._portions = memory.Portions()
        self._part: Any = None
        self._course = course.Divergence(self._say)
        self.journal: Journal | None = None  # where steps and evaluations are written; None for nowhere
        self._witness: witness.Witness | None = None
        patience = own.get("early_stopping_patience", PATIENCE)
        stops_already = any(isinstance(c, EarlyStoppingCallback) for c in self.callback_handler.callbacks)
        if eval_dataset is None:
            if train_dataset is not None:
                self._say("no eval_dataset: no early stopping, the last weights are kept")
        elif patience is not None and not stops_already:
            self.add_callback(EarlyStopping(early_stopping_patience=int(patience)))
        adapted.record.settings = changed(self.args) | own

    # ------------------------------------------------------------------ steps

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass; in parts of the batch, and the step begun anew, where memory runs out.

        Raises:
            NumbersError: naming step, rows and the first layer at fault; the weights are those of the last step.
            torch.OutOfMemoryError: a batch that cannot be divided.
        """
        self._blank = bool(self._blanks) and self._blanks.pop(0)
        if self._accord is not None:
            return self._step_of_many(self._accord, model, inputs, num_items_in_batch)
        loss = self._passed(model, inputs, num_items_in_batch)
        self._count(float(loss))
        if self.accelerator.sync_gradients:
            self._check_gradients()
        return loss

    def _count(self, loss: float) -> None:
        """A share in the loss of the step."""
        self._course.add(loss)
        if self._witness is not None:
            self._witness.add(loss)

    def _passed(self, model: Any, inputs: Any, items: Any) -> torch.Tensor:
        """The loss and gradients of one micro-batch."""
        loss: torch.Tensor = self._portions.passed(
            inputs,
            lambda part: self._pass(model, part, items),
            model.zero_grad,
            lambda rows, most: self._say(f"memory ran out at {rows} rows a forward pass: from here on {most}"),
            divide=items is not None and self._apart,
        )
        vocabulary.hold_the_rest(self.adapted)
        if self.accelerator.sync_gradients:
            self._portions.step_done()
        return loss

    def _step_of_many(self, accord: Accord, model: Any, inputs: Any, items: Any) -> torch.Tensor:
        """One micro-batch of this process; with the last one of a step come the loss and the gradients of all."""
        last = self.accelerator.sync_gradients
        if self._apart and not self.args.torch_compile:
            model = self.model  # past the wrap, whose first pass holds an exchange
        blank = self._blank and self._undivided  # a model that is divided needs all of them for any pass
        with self._sending(last):
            accord.taken(
                lambda: float(self._passed(model, inputs, items)), self._check_gradients, blank=blank, last=last
            )
        if not last:
            return torch.zeros((), device=self.args.device)
        loss, self.stops.number = accord.reached(self.stops.came, self._check_gradients)
        self._count(loss)
        return torch.tensor(loss, device=self.args.device)

    def _pass(self, model: Any, part: Any, items: Any) -> torch.Tensor:
        """Loss and gradients of what is passed through the model at once."""
        self._part = part
        loss = super().training_step(model, part, items)
        if not bool(torch.isfinite(loss)):
            with self._readout.whole():
                layer = self._layer_at_fault(lambda: self.compute_loss(model, self._prepare_inputs(part)))
            found = f"values that are not finite, first in {layer or 'the loss itself'}"
            remedy = "No step was taken. Look at these rows, or take a smaller learning rate."
            raise NumbersError(message(f"the loss is {float(loss)}", where=self._where(), found=found, remedy=remedy))
        return loss

    def _loss_now(self) -> float:
        """The loss of the last batch as evaluation would have it."""
        model, plain = self.adapted.model, torch.random.fork_rng(devices=[])
        with evaluating(model), torch.no_grad(), plain, self.compute_loss_context_manager():
            found = float(self.compute_loss(model, self._prepare_inputs(self._part))) if self._part is not None else 0.0
        return float(sum(ranks.gathered(found)))

    # ------------------------------------------------------------------ the run

    @attendance.attending()
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
            resume_from_checkpoint: a checkpoint folder, True for the newest whole one in the output folder, "auto" for
                that if there is one. What differs from the run that wrote it is refused. None: see `restarts.wanted`.
            override: what is meant to be different, by the names that the refusal lists ("learning_rate").
            args, kwargs: what transformers' `train` takes.

        Raises:
            NumbersError: a loss, gradient or weight is not finite; the last good weights are in the model.
            ContractError: what was to train did not move, what was frozen did, or the saved adapter answers otherwise.
            FolderError: nothing to resume from, a damaged checkpoint, another process that writes there.
            DiskError: the disk is full or fails.
            RequestError: the checkpoint is another run's.
            RankError: another process of the run failed, is gone, or did not come in time.
        """
        run, self._best, self._override = Path(str(self.args.output_dir)), None, tuple(override)
        with contextlib.ExitStack() as stack:
            stack.enter_context(progress.showing(wanted=self._bars))
            stack.callback(self._gauge.close)
            stack.callback(self._let_go)
            ranks.by_first(lambda: stack.enter_context(checkpoints.owned(run)))
            self.epochs.start(0, 0)
            self._throughput.start()
            unison.check_start(self.adapted, self._terms())
            asked = (resume_from_checkpoint, run, self._terms(), self._override, self.adapted.fingerprint)
            folder = restarts.place(*asked, runs.needed(self.accelerator))
            start = self._head_start() if folder is None else None
            warm = headstart.is_start(start) if folder is None else checkpoints.read(folder)["progress"].get("warm")
            self._haste = pace.haste(self.adapted.record.settings, self.args, self._own, solved=bool(warm))
            contract = checks.Contract(
                self.adapted, self._loss_now, lambda: self.accelerator.optimizer_step_was_skipped, self._say
            )
            self.pop_callback(self.stops)
            self._witness = None
            if self.journal is not None and ranks.first():
                self._witness = witness.Witness(self.journal, self._throughput)
                stack.callback(self.remove_callback, self._witness)
                self.add_callback(self._witness)
            measured = self.eval_dataset is not None and self._evaluates
            measure = (lambda: self._determine_best_metric(self.evaluate(), None)) if measured else None
            first = headstart.at_start(start, measure)  # the contract's first values are those of the first step
            for callback in (*first, contract, self._course, self.stops):  # the last says whether a step is saved
                stack.callback(self.remove_callback, callback)
                self.add_callback(callback)
            for context in (self.stops.watched(), self._matmuls(), stepping(self.adapted.model)):
                stack.enter_context(context)
            if folder is not None and runs.finished(folder, self._override):
                result = self._nothing_left(folder)
            elif start is not None and start.probe:
                result = self._solve(start)
                exchange.in_all(contract.solved)
            else:
                self._prefix = self._kept_prefix()
                randomness.spread(self.args.seed)
                try:
                    result = super().train(str(folder) if folder else None, *args, **kwargs)
                    exchange.in_all(lambda: contract.finish(whole=folder is None and not self.stops.number))
                except NumbersError:
                    self._put_back(contract.good)
                    raise
                result = result._replace(training_loss=result.metrics["train_loss"])
            unison.check_weights(self.adapted, f"the end of the run, step {self.state.global_step}")
            self.stops.number = self.stops.number or max(ranks.gathered(self.stops.came))
            if self.stops.number:
                if self.optimizer is not None:
                    self._save_checkpoint(self.model, None)
                self.stops.stop(self.state.global_step)
        if self._best is not None:
            storage.put(self.adapted, self._best, "best weights")
        record, self._best = self.adapted.record, None
        self._compare_baseline()
        fidelity.reopened(self.adapted, self.train_dataset, self.data_collator, run)
        record.notes += [remark for remark in self.remarks if remark not in record.notes]
        seconds = float(result.metrics.get("train_runtime", 0.0))
        facts.trained(record, self.state, float(result.training_loss), seconds, self._throughput.totals())
        if self.state.best_metric is not None:
            record.metrics["validation"] = {str(self.args.metric_for_best_model): float(self.state.best_metric)}
        return result

    def _solve(self, start: headstart.Start) -> TrainOutput:
        """A run without steps: the output layer takes its solved values, and is evaluated as after an epoch."""
        stateful: list[Any] = [c for c in self.callback_handler.callbacks if isinstance(c, ExportableState)]
        self.state = TrainerState(stateful_callbacks=stateful)
        self._total_loss_scalar = start.choice.train_loss
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        start.put()
        if self.eval_dataset is not None and self._evaluates:
            self._prefix = self._kept_prefix(steps=False)
            self._determine_best_metric(self.evaluate(), None)
        metrics = {"train_loss": start.choice.train_loss, "train_runtime": round(start.seconds, 4)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(0, start.choice.train_loss, metrics)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        asked = self.args.metric_for_best_model
        name, known = str(asked).removeprefix("eval_"), [found.removeprefix("eval_") for found in metrics]
        if asked is not None and name not in known:
            remedy = nearest(name, known)
            raise RequestError(message("no such metric", where=f"metric_for_best_model {asked!r}", remedy=remedy))
        better: bool = super()._determine_best_metric(metrics, trial)
        # Of equals the later: rows that choose are few, equals are many, and its learning rate was the smaller one.
        if better := better or (asked is not None and metrics[f"eval_{name}"] == self.state.best_metric):
            self.state.best_global_step = self.state.global_step
            self._best = {name: tensor.clone() for name, tensor in self.adapted.state().items()}
        return better

    def baseline(self, rows: Any) -> dict[str, float]:
        """The metrics over prepared rows of an answer without a look at them, as the training rows have it.

        A stream is not counted: there it is what the validation rows have it, or these rows themselves.
        """
        counted = next((part for part in (self.train_dataset, self.eval_dataset) if is_prepared(part)), rows)
        found: dict[str, float] = self.task.baseline(counted, rows, self.adapted.processor)
        return found

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """transformers' log; the mean loss at the end is over all steps, those before a resume too."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        elif "loss" in logs:
            logs |= self._throughput.lately()
        super().log(logs, *args, **kwargs)

    def _put_back(self, start: dict[str, torch.Tensor]) -> None:
        """After a stop on bad numbers: the best weights of the validation rows; else the last, if they are finite."""
        if self._best is not None or not finite.all_finite(self.adapted.state()):
            storage.put(self.adapted, self._best or start, "last good weights")

    def _compare_baseline(self) -> None:
        """Say it where the best weights are no better on the validation rows than an answer without a look at them."""
        name = str(self.args.metric_for_best_model).removeprefix("eval_")
        if self.state.best_metric is None or self._own_metrics or not is_prepared(self.eval_dataset):
            return
        baseline = self.baseline(self.eval_dataset)
        if self._witness is not None:
            self._witness.floor(baseline)
        greater = bool(self.args.greater_is_better)
        remark = course.unbeaten(self.state.best_metric, baseline, name, greater=greater, rows="validation")
        if remark is not None:
            self._say(remark)

    # ------------------------------------------------------------------ checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._stage) if self._stage is not None else super()._get_output_dir(trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        if self._stage is not None and folder.parent == self._stage:
            folder.mkdir()
            storage.write(self.adapted, folder)
        elif ranks.first() or not self._undivided:
            storage.save(self.adapted, folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside its place, give it a manifest, then move it there in one step.

        One process writes; the others wait, and fail with it.
        """
        unison.check_weights(self.adapted, f"the checkpoint of step {self.state.global_step}")
        self.store_flos()
        self._random = ranks.gathered(randomness.state()) if self._accord is not None else []
        self._by_first(lambda: self._write_checkpoint(model, trial))
        self.state.best_model_checkpoint = ranks.told(self.state.best_model_checkpoint)

    def _write_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(str(self.args.output_dir))
        place = run / f"checkpoint-{self.state.global_step}"
        best = run / f"checkpoint-{self.state.best_global_step}"
        place_in = {  # what transformers' state does not hold: the losses since the last log, the place in a stream
            "losses": [float(self._tr_loss), self._total_loss_scalar, self._globalstep_last_logged],
            "position": [self._draw.epoch, self.epochs.batches],
            "lanes": onward.position(self.train_dataset),
            "throughput": self._throughput.place(),
            "prefix": self._prefix.digest() if self._prefix is not None else "",
            "warm": self._haste != 1,
        }
        said = {"run": self._run, **restarts.written(), "terms": self._terms(), "progress": place_in}
        step = self.state.best_global_step
        try:
            with progress.Job("saving a checkpoint"), checkpoints.staged(place, said) as self._stage:
                self.state.best_global_step = 0  # transformers would wait for the others, who wait for this one
                super()._save_checkpoint(model, trial)
                self.state.best_global_step = step
                known = best == place or checkpoints.run_of(best) == self._run
                self.state.best_model_checkpoint = str(best) if known else None
                runs.write_state(self._stage / place.name, self.state, self._best)
        finally:
            self._stage, self.state.best_global_step = None, step
        checkpoints.rotate(run, self._run, self.keep, self.state.best_model_checkpoint)

    def store_flos(self) -> None:
        """transformers' sum over all processes; while one of them writes there is nothing to add."""
        if self._stage is None:
            super().store_flos()

    def _save_rng_state(self, output_dir: str) -> None:
        """The random state of every process, which they have told the one that writes."""
        if self._accord is None:
            super()._save_rng_state(output_dir)
        else:
            randomness.write(Path(output_dir), self._random)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        kept = checkpoints.read(folder)
        self._run, self._progress = kept["run"], kept["progress"]
        before, now = self._progress.get("prefix", ""), self._prefix.digest() if self._prefix is not None else ""
        if before != now:
            self._say(
                "the frozen prefix was computed anew since the checkpoint: the last bits of the losses may differ"
            )
        self.epochs.start(*onward.resumed(self.train_dataset, self._progress))
        self._throughput.start(*self._progress.get("throughput", ()))
        storage.put(self.adapted, manifest.read_tensors(folder, manifest.read_manifest(folder)), str(folder))
        self._best = runs.best_weights(folder)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """transformers' position in the data; a stream may have ended and begun again."""
        position: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        if self._shares is not None:  # in batches of this process, which may be others than those of the checkpoint
            self.epochs.start(*position)
        return onward.begun(self.train_dataset, self.epochs.first[0]) or position

    def _load_callback_state(self) -> None:
        with runs.own_patience(self.callback_handler):
            super()._load_callback_state()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or (self._apart and not self._override):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        steps = self.state.global_step
        runs.retune(
            self._take_moments, self.optimizer, self.lr_scheduler, Path(checkpoint), self._override, self.args, steps
        )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The random state, and with it the loss that was summed up since the last log."""
        if checkpoint is not None:
            if self._accord is None and (Path(checkpoint) / runs.RANDOM).is_file():
                super()._load_rng_state(checkpoint)
            elif not randomness.restore(Path(checkpoint)):
                randomness.spread(self.args.seed, self.state.global_step)
                self._say("the checkpoint is of another number of processes: what is drawn at random is drawn anew")
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
