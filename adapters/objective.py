"""transformers.Trainer whose rows, batches, loss and metrics are a task's, whatever the strategy.

It also keeps the frozen part quiet: in eval mode, and computed once a row where that pays (see `prefix`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import IterableDataset, SequentialSampler
from transformers import TrainingArguments

from adapters import (
    checks,
    data,
    exchange,
    featurestore,
    fused,
    headstart,
    identity,
    inflow,
    jointly,
    kept,
    lanes,
    onward,
    order,
    pace,
    prefix,
    quantize,
    ranks,
    readout,
    shares,
    throughput,
    vocabulary,
)
from adapters.accord import Accord
from adapters.arguments import asks_for_steps, complaints, one_gpu, settings
from adapters.contracts import Adapted, Draw
from adapters.dividing import DividedTrainer
from adapters.epochs import Epochs, Longest, ordered
from adapters.evaluation import Evaluation
from adapters.formats import arrange
from adapters.predict import is_prepared
from adapters.progress import Job

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


class ObjectiveTrainer(DividedTrainer):
    """What a run learns and measures; how it goes and what it leaves is `Trainer`'s."""

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
        given = others.get("compute_metrics")
        self._own_metrics = own_metrics = given is not None
        parts = tuple(eval_dataset) if isinstance(eval_dataset, Mapping) else ()
        of_recipe, evaluated = isinstance(train_dataset, inflow.Inflow), eval_dataset is not None
        arguments, own = settings(
            adapted, args, evaluated=evaluated, own_metrics=own_metrics, parts=parts, streamed=of_recipe
        )
        self._own = own
        if idle := one_gpu(arguments):
            self._say(idle)
        task = adapted.task
        self._data: dict[str, dict[str, Any]] = {}
        self._draw = Draw(arguments.seed)
        if of_recipe or isinstance(train_dataset, IterableDataset):
            train_dataset = onward.opened(adapted, train_dataset, columns, self._draw, own, arguments.max_steps)
            adapted.record.data = self._data["data"] = train_dataset.source.fingerprint()
        elif train_dataset is not None:
            rows = self._rows_of(train_dataset)
            adapted.record.data = self._data["data"] = identity.fingerprint(rows)
            train_dataset = self._inputs(rows, self._data["data"])
            task = task.with_data(rows)
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: self._validation(part, f".{name}") for name, part in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._validation(eval_dataset)
        self.task = adapted.record.task = task
        self._draws = others.get("data_collator") is None
        others.setdefault(
            "data_collator", functools.partial(task.collate, model=adapted.model, processor=adapted.processor)
        )
        tasks_loss = others.get("compute_loss_func") is None
        others.setdefault("compute_loss_func", self._loss)
        others["compute_metrics"] = functools.partial(self._in_order, given) if own_metrics else self._metrics
        others.setdefault("processing_class", adapted.processor)
        self.keep = arguments.save_total_limit
        arguments.save_total_limit = None  # rotation is ours: it deletes nothing that this run did not write
        with quantize.accepted(adapted.model), complaints():
            given_rows: dict[str, Any] = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
            super().__init__(model=adapted.model, args=arguments, **given_rows, **others)
        # The loss comes from the task alone, so the models' own normalisation by item counts stays out of it.
        self.model_accepts_loss_kwargs = False
        self._loss_shifts_labels = False
        self.label_smoother = None
        trained = adapted.trained
        asked = any(vars(module).get("gradient_checkpointing") for module in adapted.model.modules())
        recomputed = asked or bool(self.args.activation_checkpointing)
        dropout = bool(own.get("frozen_dropout"))
        self._quiet = order.quiet(adapted.model, trained, recomputed=recomputed, dropout=dropout)
        self._paces = adapted.strategy.paces(adapted.model, trained)
        if train_dataset is not None:
            pace.check_run(self._paces, self.args, own_optimizer=self.optimizer is not None)
            if (dead := checks.check_rows(train_dataset, task)) is not None:
                self._say(dead)
            self.add_callback(pace.Joining(self._paces))
        self.is_fsdp_enabled = False  # accelerate divides the model; transformers would save and load all of it
        alone = tasks_loss and self._undivided and not self.args.torch_compile
        wanted = own.get("chunked_loss") if alone else False
        self._stepped = asks_for_steps(args) or others.get("optimizers", (None, None))[0] is not None
        self._plain = tasks_loss and self._draws and self._undivided
        self._readout = readout.Readout(adapted.model, task, adapted.processor, self._say, wanted=wanted)
        self._throughput = throughput.Throughput()
        self.add_callback(self._throughput)
        self._training = {name: p for name, p in adapted.model.named_parameters() if name in trained}
        how = {"divided": not self._apart, "apart": self._undivided}
        self._accord = Accord(self.accelerator, self._training, **how) if self.args.world_size > 1 else None
        self._shares: shares.Shares | None = None  # this process' rows of the steps
        self._blanks: list[bool] = []  # of the micro-batches of the step at hand that are still to come
        self._blank = False
        self.known = featurestore.Known()  # runs that share it find things out once
        self._prefix: prefix.Prefix | None = None
        self._evaluation: Evaluation | None = None  # the one at hand
        self._batch_rows: list[int] | None = None
        self._batch_keys: tuple[torch.Tensor, int, list[bytes]] | None = None  # of the batch that was prepared last
        self.epochs = Epochs(self._draw)
        self.add_callback(self.epochs)
        if isinstance(train_dataset, lanes.Flow):
            self.add_callback(onward.Onward(train_dataset, lambda: self.epochs.batches, self._say))

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
        self._data[f"validation_data{name}"] = data = identity.fingerprint(rows)
        return self._inputs(rows, data)

    def _inputs(self, rows: Dataset, data: Mapping[str, Any] | None = None) -> Dataset:
        if is_prepared(rows):
            return rows
        with Job("preparing", len(rows), "rows"):
            prepared, remarks = jointly.prepared(rows, self.adapted, data)
        for remark in remarks:
            self._say(remark)
        return prepared

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
        drawing = functools.partial(plain, draw=self._draw) if self._draws else plain
        counted = functools.partial(throughput.counted, drawing)
        if isinstance(self.train_dataset, lanes.Flow):
            return self.train_dataset.loader(self.args.train_batch_size, counted, self.args.dataloader_num_workers)
        self.data_collator = counted
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' loader; where there are several processes, of the rows that are this one's."""
        loader, world = super()._get_dataloader(*args, **kwargs), self.args.world_size
        found = shares.divided(loader, kwargs["batch_size"], world, self.args.process_index) if world > 1 else None
        if kwargs.get("is_training"):
            self._shares = found
        return loader

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' choice, in an order that seed and epoch alone decide."""
        return ordered(super()._get_train_sampler(*args, **kwargs), self.args, self._draw)

    def _get_eval_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Rows of like length together, the longest first: hardly any padding, and memory runs out at once or never."""
        chosen = super()._get_eval_sampler(*args, **kwargs)
        rows = args[0] if args else kwargs["eval_dataset"]
        if chosen is None and self.args.world_size > 1 and hasattr(rows, "__len__"):
            chosen = SequentialSampler(rows)  # transformers leaves it to accelerate
        return Longest(rows["length"][:]) if chosen is not None and is_prepared(rows) else chosen

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' loop; the task's metrics need the rows, and its loss is a mean over items, not over rows.

        What it gives is in the order of the rows, whatever order they were read in.
        """
        evaluation = self._evaluation = Evaluation(dataloader)
        try:
            with evaluation.passing(self, apart=self._undivided):
                result = super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self._evaluation = None  # rows that come now are those of a step
        found = [evaluation.put_back(part) for part in (result.predictions, result.label_ids)]
        loss = evaluation.loss()
        if loss is not None and result.metrics is not None:
            result.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = loss
        metrics = ranks.told(result.metrics)  # what is decided by them is decided alike
        return result._replace(predictions=found[0], label_ids=found[1], metrics=metrics)

    def _in_order(self, own: Any, found: Any, **kwargs: Any) -> Any:
        """The caller's own metrics, of predictions in the order of the rows."""
        if self._evaluation is not None and not self.args.batch_eval_metrics:
            for part in ("predictions", "label_ids", "inputs", "losses"):
                setattr(found, part, self._evaluation.put_back(getattr(found, part)))
            return exchange.in_all(lambda: own(found, **kwargs))
        return own(found, **kwargs)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Loss, what the task's metrics need, and the rows' numbers; a caller's own metrics get logits and labels."""
        evaluation = cast("Evaluation", self._evaluation)
        counts = evaluation.batch()
        if self._own_metrics or prediction_loss_only or "row" not in inputs or "labels" not in inputs:
            items = self.task.items(inputs["labels"]) if "labels" in inputs and counts else 0
            with self._readout.whole():
                step: Any = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            if step[0] is not None:
                evaluation.add(float(step[0]), items)
            return cast("tuple[Any, Any, Any]", step)
        numbers = torch.as_tensor(inputs["row"], device=self.args.device)
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, dict(batch), return_outputs=True)
            found = self.task.measured(outputs, batch, self.adapted.model, self.adapted.processor)
        evaluation.add(float(loss), self.task.items(batch["labels"]) if counts else 0)
        return loss.detach(), tuple(part.contiguous() for part in found), numbers

    def _metrics(self, found: Any) -> dict[str, float]:
        parts = found.predictions if isinstance(found.predictions, tuple) else (found.predictions,)
        evaluation = cast("Evaluation", self._evaluation)
        parts, numbers = evaluation.whole(parts), evaluation.whole(found.label_ids)
        place = {number: position for position, number in enumerate(evaluation.rows["row"][:])}
        back = sorted(range(len(numbers)), key=lambda index: place[int(numbers[index])])
        ordered = [part[back] for part in parts]
        return exchange.in_all(lambda: self.task.metrics(ordered, evaluation.rows, self.adapted.processor))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """transformers' optimizer, its groups divided by the strategy's rates."""
        fresh = self.optimizer is None
        if fresh:
            pace.let_join(self.adapted.model, self._paces, float("inf"))  # an earlier run may have broken off
        optimizer = super().create_optimizer(model)
        if fresh:
            pace.set_rates(optimizer, self.adapted.model, self._paces, self._haste)
        return optimizer

    # ------------------------------------------------------------------ steps

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule. A share of one step is rounded up by transformers: that step would have no learning rate."""
        asked = self.args.warmup_steps
        if num_training_steps == 1 and asked < 1:
            self.args.warmup_steps = 0
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        finally:
            self.args.warmup_steps = asked

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' batches of a step; counted, so that a resumed run finds its place in a stream."""
        self._throughput.begin()
        read, before, own, stream = args[0], self.epochs.batches, self._shares, self.train_dataset
        if isinstance(stream, lanes.Flow):
            read, self._blanks = stream.step(*args[:2])
        blanks = list(self._blanks)
        if self._accord is None:
            batches, items = super().get_batch_samples(iter(read), *args[1:], **kwargs)
            self._throughput.take(batches)
        else:
            batches, self._blanks, items = self._accord.batches(
                itertools.islice(read, args[1]),
                self.task.items,
                lambda number: blanks[number] if blanks else own is not None and own.blank(before + number),
                self._throughput,
            )
        self.epochs.batches += len(batches)
        return batches, items

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """Loss items of the global batch, as the task counts them."""
        if self._evaluation is not None and self.args.world_size > 1:
            return None  # an evaluated batch is this process' own: its mean, which no number of processes scales
        if not batch_samples or "labels" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        batch_samples = [b for n, b in enumerate(batch_samples) if True not in self._blanks[n : n + 1]]
        return max(1, sum(self.task.items(batch["labels"]) for batch in batch_samples))

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The task's loss, with the frozen part in eval mode: below the lowest trained module, and in frozen blocks."""
        if model.training:
            for module in self._quiet:  # past nn.Module's __setattr__: hundreds of them, in every step
                vars(module)["training"] = False
        with self._readout.passing(inputs), contextlib.ExitStack() as stack:
            if self._prefix is not None:
                stack.enter_context(self._prefix.given(inputs, self._keys_of(inputs)))
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _keys_of(self, inputs: Any) -> list[bytes] | None:
        """What the rows are known by, where these are the inputs that were prepared last, and nobody changed them."""
        if self._batch_keys is None:
            return None
        tensor, version, keys = self._batch_keys
        same = inputs.get(self.adapted.model.main_input_name) is tensor and tensor._version == version
        return keys if same else None

    def _matmuls(self) -> contextlib.AbstractContextManager[Any]:
        """Each adapted matmul as one function, products in bfloat16 where that pays and nothing else was said."""
        wanted, args = self._own.get("fused", True), self.args
        if wanted and args.torch_compile:
            logger.info("torch_compile: the compiler gets the layers' own forward (fused)")
        if not wanted or args.torch_compile:
            return contextlib.nullcontext()
        how = fused.Plan()
        if wanted != "float32" and not (args.bf16 or args.fp16) and self._undivided:
            how = fused.plan(self.adapted.model, args.device)
        if how.why:
            self._say(how.why)
        return fused.fused(self.adapted.model, how)

    def _loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        """The task's loss of a pass, whose logits may not have been computed."""
        loss = self.task.loss(self._readout.read(outputs), labels, num_items_in_batch)
        return loss * 0 if self._blank and torch.is_grad_enabled() else loss

    def _head_start(self) -> headstart.Start | None:
        """The new output layer of this run, solved: instead of all steps, or as their start."""
        rows, held = self.train_dataset, self.eval_dataset
        if not self._plain or isinstance(rows, IterableDataset):
            return None
        given = headstart.Rows(
            train=rows,
            held=next(iter(held.values())) if isinstance(held, Mapping) else held,
            collate=cast("Any", self.data_collator),
            device=self.args.device,
            computing=self.compute_loss_context_manager,
            seed=self.args.seed,
            draw=self._draw,
            cache=self._cache if self._own.get("prefix_cache", True) else {},
            known=self.known,
        )
        self._move_model_to_device(self.adapted.model, self.args.device)
        wanted = self._own.get("warm_head")
        found, remarks = headstart.begun(self.adapted, given, probe=not self._stepped, wanted=wanted)
        for remark in remarks:
            self._say(remark)
        return found

    def _kept_prefix(self, *, steps: bool = True) -> prefix.Prefix | None:
        """The frozen prefix of all rows, where they pass more than once and it never changes; see `kept.passes`."""
        draw, args, collate = self._draw, self.args, cast("Any", self.data_collator)
        wanted = self._own.get("prefix_cache", True)
        if not wanted or not self._draws or not self._undivided:
            return None
        parts = self.eval_dataset.values() if isinstance(self.eval_dataset, Mapping) else [self.eval_dataset]
        held = [part for part in parts if part is not None]
        request = kept.Request(
            sets=[self.train_dataset, *held],
            passes=kept.passes(args, self.train_dataset, len(held), evaluates=self._evaluates, steps=steps),
            collate=lambda rows, training: collate(rows, draw=draw) if training else collate(rows),
            redraw=lambda epoch: setattr(draw, "epoch", epoch),
            dtype=torch.bfloat16 if wanted == "bfloat16" else None,
            device=args.device,
            noisy=bool(self._own.get("frozen_dropout")),
            names=self.known.names,
            **self._cache,
        )
        self._move_model_to_device(self.adapted.model, args.device)
        with self.compute_loss_context_manager():
            found, remark = kept.kept(self.adapted.model, self.adapted.trained, request)
        if remark and steps:  # one evaluation is no loss
            self._say(remark)
        return found

    @property
    def _cache(self) -> dict[str, Any]:
        """Whose states are kept, and how many of them on disk."""
        fingerprint = self.adapted.fingerprint.digest
        return {"fingerprint": fingerprint, "gigabytes": self._own.get("prefix_cache_gb"), "say": self._say}

    @property
    def _evaluates(self) -> bool:
        """Whether the run passes its validation rows."""
        return str(getattr(self.args.eval_strategy, "value", "no")) != "no"

    def _prepare_inputs(self, inputs: Any) -> Any:
        self._batch_rows = rows = inputs.get("row")
        prepared = super()._prepare_inputs({name: value for name, value in inputs.items() if name != "row"})
        self._batch_keys = None
        if self._prefix is not None and rows is not None:
            known = self._prefix.known(self.train_dataset if self._evaluation is None else self._evaluation.rows)
            if known is not None:  # so that no step waits for its inputs to come back from the device
                tensor = prepared[self.adapted.model.main_input_name]
                self._batch_keys = tensor, tensor._version, [known[int(row)] for row in rows]
        return prepared

    def _clip_grad_norm(self, model: Any) -> Any:
        """transformers' clipping, of what trains alone: its walk through all parameters costs more than the norm."""
        if not self._undivided:
            return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        return self.accelerator.clip_grad_norm_(self._training.values(), self.args.max_grad_norm)

    @functools.cached_property
    def _operations(self) -> int:
        """Floating-point operations a token, as transformers counts them."""
        return 6 * int(self.adapted.model.num_parameters(exclude_embeddings=True))

    def floating_point_ops(self, inputs: Any) -> int:
        """transformers' number, without counting the parameters in every step."""
        name = self.adapted.model.main_input_name
        return self._operations * inputs[name].numel() if name in inputs else 0

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """transformers' choice, without tensors that only grew: decay would move the entries that do not train."""
        names: list[str] = super().get_decay_parameter_names(model)
        grown = vocabulary.grown(self.adapted)
        return [name for name in names if name not in grown]
