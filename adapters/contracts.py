"""The types that the rest of the library speaks in: Strategy, Task, Adapted, Record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, final, runtime_checkable

from adapters.errors import RequestError, SpentError, message

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.edits import Edit
    from adapters.fingerprint import Fingerprint
    from adapters.pace import Pace
    from adapters.quantize import Storage


class Strategy(Protocol):
    """What trains, what the trained tensors mean for the backbone, how to leave no trace.

    A strategy is a frozen dataclass; its fields are its whole configuration and are saved as they are.
    """

    name: ClassVar[str]

    @property
    def defaults(self) -> Mapping[str, object]:
        """The training settings, or our own, that work without a knob; a value may be a function of the model."""
        ...

    def resolve(self, model: PreTrainedModel, head: frozenset[str]) -> Self:
        """A copy with every "auto" made concrete; this is what is saved and loaded. Checks, changes nothing."""
        ...

    def apply(self, model: PreTrainedModel) -> set[str]:
        """Change modules where the method needs it; returns the names of the parameters that train."""
        ...

    def begin(self, model: PreTrainedModel) -> None:
        """Give what trains its first values where they come from the backbone's weights; `load` leaves this out."""
        ...

    def paces(self, model: PreTrainedModel, trained: Sequence[str]) -> Mapping[str, Pace]:
        """The parameters that learn at another rate than the run's, or not from the start; by name in memory."""
        ...

    def key(self, name: str) -> str:
        """The name in the adapter file of a parameter that trains."""
        ...

    def edits(self, state: Mapping[str, Tensor]) -> dict[str, Edit]:
        """What the tensors of an adapter file did to the backbone, by the backbone's own tensor name."""
        ...

    def strip(self, model: PreTrainedModel) -> None:
        """Put the original module objects back and leave no trace."""
        ...

    def sidecars(self) -> dict[str, dict[str, Any]]:
        """Further JSON files of the adapter folder, such as peft's adapter_config.json."""
        ...


@final
@dataclass(frozen=True)
class Vocabulary:
    """Tokens that an adaptation added to its backbone.

    Attributes:
        tokens: as text; ids: their numbers.
        size: entries of every tensor that follows the vocabulary's size.
        axes: the tensors of which only the added entries train and are saved: own name -> axis.
        whole: the tensors that have grown and train whole (heads, or everything): own name -> axis.
    """

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    size: int
    axes: Mapping[str, int]
    whole: Mapping[str, int] = field(default_factory=dict)

    def key(self, strategy: Strategy, name: str) -> str:
        """The key of a tensor's added entries in the adapter file: the one that peft gives trainable tokens."""
        path, _, leaf = name.rpartition(".")
        return strategy.key(f"{path}.token_adapter.trainable_tokens_delta" if leaf == "weight" else f"{name}.added")

    def beside(self, trained: set[str]) -> Vocabulary:
        """The same where some of the tensors (by their own names) train whole."""
        whole = {name: axis for name, axis in self.axes.items() if name in trained}
        return dataclasses.replace(
            self, axes={n: axis for n, axis in self.axes.items() if n not in whole}, whole={**self.whole, **whole}
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "tokens": list(self.tokens),
            "ids": list(self.ids),
            "size": self.size,
            "axes": dict(self.axes),
            "whole": dict(self.whole),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Vocabulary:
        """From plain data."""
        return cls(
            tuple(str(token) for token in entry["tokens"]),
            tuple(int(index) for index in entry["ids"]),
            int(entry["size"]),
            {str(name): int(axis) for name, axis in entry["axes"].items()},
            {str(name): int(axis) for name, axis in entry["whole"].items()},
        )


@final
@dataclass
class Draw:
    """What is random about a row: the same for the same seed, epoch and row, whatever came before.

    The trainer moves `epoch` on; a resumed run therefore draws what an uninterrupted one would have drawn.
    """

    seed: int = 0
    epoch: int = 0

    def generator(self, row: int) -> np.random.Generator:
        """A generator for one row of the prepared data."""
        import numpy as np

        return np.random.default_rng((self.seed, self.epoch, row))


@runtime_checkable
class Task(Protocol):
    """What the model is for: its class and head, how rows become inputs, losses, metrics and answers.

    A task is a frozen dataclass; its fields are saved with the adapter. One raw row may become several prepared rows
    (windows of a long text) or share one (packing); everything after `prepare` speaks of prepared rows.

    Attributes:
        auto_class: transformers' Auto class that makes the model.
        pipeline: transformers' pipeline that gives the same answers.
        processor: transformers' Auto class of tokenizer or image processor.
        columns: what raw rows hold; the first is what a bare value given to `predict` stands for.
        apart: columns whose equal values never stand in two parts of a split; the first that the rows have counts.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    pipeline: ClassVar[str]
    processor: ClassVar[str]
    columns: ClassVar[Mapping[str, str]]
    apart: ClassVar[tuple[str, ...]]

    @property
    def best_metric(self) -> tuple[str, bool]:
        """The metric that chooses the best weights, and whether greater is better."""
        ...

    @property
    def stratum(self) -> str | None:
        """The column whose values a split keeps in proportion; None for none."""
        ...

    def complete(self, model: PreTrainedModel) -> Self:
        """A copy with what it left open read off a live model; raises where the model's head does not fit."""
        ...

    def config(self) -> dict[str, Any]:
        """The model configuration fields that this task sets when a model is loaded for it."""
        ...

    def head(self, model: PreTrainedModel) -> set[str]:
        """The parameters of the task's head: they always train and are saved.

        Empty where the output layer is a part of the pretrained model (language models).
        """
        ...

    def with_rows(self, rows: Dataset) -> Self:
        """A copy with what raw training rows decide and the request left open (the label names)."""
        ...

    def with_data(self, rows: Dataset) -> Self:
        """A copy with what depends on the training rows made concrete (balanced class weights)."""
        ...

    def check(self, rows: Dataset, *, labelled: bool) -> None:
        """Look at every raw row before anything is loaded; raises with the row's number and column."""
        ...

    def prepare(
        self, rows: Dataset, processor: Any, model: PreTrainedModel, *, labelled: bool
    ) -> tuple[Dataset, list[str]]:
        """Model inputs from raw rows, with columns "length" and "row" (0, 1, ...); and remarks to be said once."""
        ...

    def collate(
        self, features: Sequence[Mapping[str, Any]], model: PreTrainedModel, processor: Any, draw: Draw | None = None
    ) -> dict[str, Any]:
        """One batch from prepared rows, padded as the model expects it: model inputs, "labels" and "row".

        Args:
            features: prepared rows.
            model, processor: of the adaptation.
            draw: what is random about a training row; None while evaluating, where nothing changes from run to run.
        """
        ...

    def items(self, labels: Tensor) -> int:
        """How many items the loss of a batch with these labels is a sum over."""
        ...

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss, summed over the batch and divided by the items of the whole global batch."""
        ...

    def measured(
        self, outputs: Any, batch: Mapping[str, Any], model: PreTrainedModel, processor: Any
    ) -> tuple[Tensor, ...]:
        """What the metrics need of a labelled batch, each part with the rows first; later dimensions may vary."""
        ...

    def metrics(self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, processor: Any) -> dict[str, float]:
        """Numbers from what was measured (padded with -100) over these prepared rows."""
        ...

    def answered(self, model: PreTrainedModel, batch: Mapping[str, Any], processor: Any) -> tuple[Tensor, ...]:
        """What the answers to a batch need, in the same form."""
        ...

    def decode(
        self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, processor: Any
    ) -> list[dict[str, Any] | list[dict[str, Any]]]:
        """One answer a raw row, as the matching transformers pipeline would give it."""
        ...

    def baseline(self, train: Dataset, test: Dataset, processor: Any) -> dict[str, float]:
        """The metrics of the best answer that never looks at the input (the majority class, the mean)."""
        ...

    def describe(self) -> str:
        """What the task answers, in one short line."""
        ...


@runtime_checkable
class Showing(Protocol):
    """A task that has more to show of an evaluation than its metrics; one that has not needs nothing of this."""

    def findings(
        self, found: Sequence[np.ndarray[Any, Any]], rows: Dataset, raw: Dataset | None, processor: Any
    ) -> dict[str, Any]:
        """What a report shows of an evaluation, as plain JSON by the keys of `report.SHOWN`.

        Args:
            found: what was measured.
            rows: prepared rows; raw: those that they were made of, None where the rows came prepared.
            processor: of the adaptation.
        """
        ...


@runtime_checkable
class Asking(Protocol):
    """A task whose answers are texts, of which a report shows a few."""

    def asked(
        self, raw: Dataset, processor: Any, model: PreTrainedModel
    ) -> tuple[Task, list[dict[str, Any]], list[tuple[str, str]]]:
        """The task with short answers, rows for `predict`, and of each what is given and what was wanted, as texts."""
        ...


@runtime_checkable
class Mixing(Protocol):
    """Several adapters on one backbone, of which each row of a batch takes its own (`adapters.Shared`)."""

    def predict(self, rows: Any, adapter: Sequence[str] | str, batch_size: int) -> list[Any]:
        """One answer a row, by the row's own adapter."""
        ...


@final
@dataclass
class Record:
    """What happened to an adaptation, for the manifest; the only part of `Adapted` that changes.

    Attributes:
        backbone: id or folder of the backbone, empty for a live model without one.
        revision: the hub commit, empty where there is none; seed: of every new tensor.
        task: the task as the training rows completed it (balanced class weights); None before training.
        unread: parameters that would train, but that the head's reading leaves out of the computation; own names.
        new: backbone parameters that loading reported as newly initialised.
        first: of a new adaptation's new head, digests of the values that it began with; not saved.
        load: the loading options, without the token.
        config: fields of the backbone's config that were set besides the task's (a padding token).
        data: fingerprint and row counts of the data it was trained on.
        metrics: what was measured, by split.
        settings: the training settings that differ from transformers' own defaults.
        recipe: the run as data; empty where no recipe can repeat it, then `why_not` says why.
        notes: remarks that were said once and belong to the adapter (padding token, truncation).
        folders: digests of the manifests that it was read from and written under -> of the tensors that these name.
        spent: merged: saving, training and merging again are refused.
        shared: its name on a shared backbone, which nothing may change; empty everywhere else.
    """

    backbone: str = ""
    revision: str = ""
    seed: int = 0
    task: Task | None = None
    unread: frozenset[str] = frozenset()
    new: tuple[str, ...] = ()
    first: dict[str, str] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    why_not: str = "the model was adapted by a program, not by a recipe"
    notes: list[str] = field(default_factory=list)
    folders: dict[str, str] = field(default_factory=dict)
    spent: bool = False
    shared: str = ""
    gathered: dict[str, Tensor] | None = None  # the trained tensors whole, while a divided model's are written


@final
@dataclass(frozen=True)
class Adapted:
    """A model with a strategy applied to it.

    Attributes:
        model: the very object that was adapted; plain transformers API.
        strategy, task, storage: resolved.
        processor: tokenizer or image processor.
        chosen: the names in memory of the parameters that the strategy trains, sorted.
        brought: of these (by the backbone's own names), the head and whatever loading made new.
        fingerprint: identity of the backbone.
        names: backbone tensor name in memory -> name in a saved checkpoint of this model class.
        record: what happened; its one mutable part.
        vocabulary: the tokens that were added, None for none.
    """

    model: PreTrainedModel
    strategy: Strategy
    task: Task
    processor: Any
    storage: Storage
    chosen: tuple[str, ...]
    brought: frozenset[str]
    fingerprint: Fingerprint
    names: Mapping[str, str]
    record: Record
    vocabulary: Vocabulary | None = None

    @property
    def trained(self) -> tuple[str, ...]:
        """The names in memory of the parameters that train, sorted: the chosen ones, as far as they are read."""
        from adapters.anatomy import own_name

        return tuple(name for name in self.chosen if own_name(name) not in self.record.unread)

    @property
    def head(self) -> frozenset[str]:
        """Of these (by the backbone's own names), the head and whatever loading made new."""
        return self.brought - self.record.unread

    def state(self) -> dict[str, Tensor]:
        """The trained tensors by their keys in the adapter file; views of the live parameters, not copies.

        Of tensors that only grew, copies of the added entries; of a model divided by FSDP, the parts held here.
        """
        if self.record.spent:
            raise SpentError(
                message(
                    "this adapter was merged into its model",
                    where="Adapted",
                    remedy="Load the adapter folder again, or adapt the merged model.",
                )
            )
        if self.record.shared:
            raise RequestError(
                message(
                    "an adapter on a shared backbone can only be read",
                    where=self.record.shared,
                    remedy="adapters.load(folder) opens it for training, saving and merging.",
                )
            )
        found = {}
        for key, tensor, axis in self.places():
            found[key] = tensor if axis is None else tensor.index_select(axis, self.added_ids(tensor))
        return found

    def places(self) -> list[tuple[str, Tensor, int | None]]:
        """Where the tensors of the adapter file live: key, live tensor, and the axis of the added entries, or None."""
        from adapters.anatomy import own_name

        tensors: dict[str, Tensor] = dict(self.model.named_buffers()) | dict(self.model.named_parameters())
        axes = self.vocabulary.axes if self.vocabulary is not None else {}
        whole = [name for name in self.trained if own_name(name) not in axes]
        found: list[tuple[str, Tensor, int | None]] = [
            (self.strategy.key(name), tensors[name].detach(), None) for name in whole
        ]
        if self.vocabulary is not None and axes:
            own = {own_name(name): tensor.detach() for name, tensor in tensors.items()}
            found += [(self.vocabulary.key(self.strategy, name), own[name], axis) for name, axis in axes.items()]
        gathered = self.record.gathered or {}
        return [(key, gathered.get(key, tensor), axis) for key, tensor, axis in found]

    def added_ids(self, like: Tensor) -> Tensor:
        """The ids of the added tokens, on the device of a tensor."""
        import torch

        ids = self.vocabulary.ids if self.vocabulary is not None else ()
        return torch.tensor(ids, dtype=torch.long, device=like.device)

    def _sizes(self) -> list[tuple[int, int]]:
        """Elements and bytes of an element, for each tensor of the adapter file."""
        added = len(self.vocabulary.ids) if self.vocabulary is not None else 0
        return [
            (tensor.numel() if axis is None else tensor.numel() // tensor.shape[axis] * added, tensor.element_size())
            for _, tensor, axis in self.places()
        ]

    @property
    def trained_count(self) -> int:
        """Parameters that train."""
        return sum(count for count, _ in self._sizes())

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the trained tensors, about the size of the adapter file."""
        return sum(count * width for count, width in self._sizes())

    def __str__(self) -> str:
        from adapters.anatomy import class_name, count

        total = count(self.model.parameters())
        trained = self.trained_count
        head = sum(p.numel() for n, p in self.model.named_parameters() if n in self.head)
        storage = self.storage.quantization or str(self.model.dtype).removeprefix("torch.")
        return (
            f"{self.strategy.name} on {class_name(self.model)}"
            f"{f' ({self.record.backbone})' if self.record.backbone else ''} for {self.task.describe()}\n"
            f"  trains  {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %), {head:,} of them head\n"
            f"  frozen  {total - trained:,} parameters, kept as {storage}\n"
            f"  file    about {self.adapter_bytes / 1e6:.2f} MB"
        )

    def __repr__(self) -> str:
        return f"<Adapted {self}>"
