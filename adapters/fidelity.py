"""Whether a folder answers as the adapted model does: outputs of both.

A merged folder is opened in a process of its own; a saved adapter on the frozen tensors of the live model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import disk
from adapters.checks import some
from adapters.contracts import Adapted, Task
from adapters.errors import ContractError, message
from adapters.manifest import MANIFEST, is_standalone
from adapters.pixels import noise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 8  # rows of the check
FEW = 4  # rows on which a saved adapter is compared
FEW_ROWS, FEW_TOKENS = 2, 6  # of inputs at random, where each pass reads the model from the disk
BATCH = 32  # rows per forward pass
LENGTH = 24  # tokens of a synthetic row, where the model takes so many


def compare(
    adapter: str, merged: str, base: str, rows: list[Any] | None, dtype: str | None = None, *, few: bool = False
) -> dict[str, Any]:
    """Max and mean difference of the outputs, agreement of the best answers, spread of the outputs, dtype at work.

    Args:
        adapter: the adapter folder.
        merged: the plain transformers folder, a backbone with its head beside it, or another adapter of the backbone.
        base: the backbone's folder.
        rows: raw rows of the task, or bare values of its first column; None makes inputs at random (pictures of noise
            for an image processor).
        dtype: in which both compute; None for each one's own.
        few: the models are larger than memory and are read from the disk for each pass: inputs at random are short.
    """
    import torch

    from adapters.storage import load

    adapted = load(adapter, base, verify="fast")
    batches = inputs(adapted.task, adapted.processor, adapted.model, rows, few=few)
    own = str(adapted.model.dtype).removeprefix("torch.")
    if dtype is not None:
        adapted.model.to(getattr(torch, dtype))
    wanted, auto_class = outputs(adapted.model, batches), adapted.task.auto_class
    del adapted
    return against(wanted, batches, merged, base, auto_class, dtype) | {"dtype": own}


def against(
    wanted: Sequence[Any],
    batches: Sequence[dict[str, Any]],
    merged: str,
    base: str,
    auto_class: str,
    dtype: str | None = None,
) -> dict[str, float]:
    """How far a written folder, read back, lies from outputs that it should give.

    Args:
        wanted: the outputs; batches: of what.
        merged, base, dtype: as for `compare`.
        auto_class: transformers' Auto class that opens a plain folder.
    """
    import torch
    import transformers

    from adapters.storage import load

    auto: Any = getattr(transformers, auto_class)
    if is_standalone(Path(merged)):
        opened = load(merged).model
    elif (Path(merged) / MANIFEST).is_file():
        opened = load(merged, base, verify="fast").model
    else:
        opened = auto.from_pretrained(merged, dtype="auto", trust_remote_code=False)
    return apart(wanted, outputs(opened if dtype is None else opened.to(getattr(torch, dtype)), batches))


def inputs(
    task: Task, processor: Any, model: PreTrainedModel, rows: list[Any] | None, *, few: bool = False
) -> list[dict[str, Any]]:
    """Batches of these rows; of inputs at random where there are none, short where they should be few."""
    if not rows and processor is not None and model.main_input_name == "pixel_values":
        rows = list(noise(ROWS, model))
    if rows and processor is not None:
        return _of_rows(task, processor, model, rows)
    batch = synthetic(model)
    if few and "input_ids" in batch:
        batch = {name: value[:FEW_ROWS, :FEW_TOKENS] for name, value in batch.items()}
    return [batch]


def apart(wanted: Sequence[Any], found: Sequence[Any]) -> dict[str, float]:
    """Max and mean difference of two models' outputs, agreement of their best answers, spread of the first's."""
    import torch

    difference = torch.cat([(one - other).abs().flatten() for one, other in zip(wanted, found, strict=True)])
    return {
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "agreement": float(torch.cat([_agree(one, other) for one, other in zip(wanted, found, strict=True)]).mean()),
        "spread": float(torch.cat([one.flatten() for one in wanted]).std()),
    }


def _agree(one: Any, other: Any) -> Any:
    """1 where the best answer is the same: the last dimension's greatest, or for a single number its value."""
    import torch

    if one.shape[-1] > 1:
        return (one.argmax(-1) == other.argmax(-1)).float().flatten()
    return torch.isclose(one, other, rtol=1e-3, atol=1e-5).float().flatten()


def outputs(model: Any, batches: Sequence[dict[str, Any]]) -> list[Any]:
    """What the head gives for each batch: logits, or the start and end logits of an answer."""
    import torch

    model.eval()
    found = []
    with torch.inference_mode():
        for batch in batches:
            outputs = model(**batch)
            found += [_seen(outputs[name].float(), batch) for name in outputs if name.endswith("logits")]
    return found


def _seen(logits: Any, batch: dict[str, Any]) -> Any:
    """The logits of a sequence where it is no padding; what stands there means nothing."""
    mask = batch.get("attention_mask")
    if mask is None or logits.ndim != 3 or logits.shape[:2] != mask.shape or "decoder_input_ids" in batch:
        return logits
    return logits[mask.bool()]


def _of_rows(task: Task, processor: Any, model: PreTrainedModel, rows: list[Any]) -> list[dict[str, Any]]:
    """The task's own batches from raw rows, without labels."""
    from datasets import Dataset

    first = next(iter(task.columns))
    raw = Dataset.from_list([row if isinstance(row, dict) else {first: row} for row in rows])
    prepared, _ = task.prepare(raw, processor, model, labelled=False)
    batches = []
    for start in range(0, len(prepared), BATCH):
        features = [prepared[index] for index in range(start, min(start + BATCH, len(prepared)))]
        batch = task.collate(features, model, processor)
        batches.append(_complete(model, {n: v for n, v in batch.items() if n not in ("row", "labels")}))
    return batches


def synthetic(model: Any) -> dict[str, Any]:
    """Inputs at random that the model takes: pixels, or token ids from its vocabulary."""
    import torch

    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config()
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", LENGTH) or LENGTH
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.randn((ROWS, config.num_channels, height, width), generator=generator)}
    length = min(LENGTH, getattr(config, "max_position_embeddings", LENGTH) or LENGTH)
    low = min(8, config.vocab_size - 1)  # the first ids are padding and the like
    ids = torch.randint(low, config.vocab_size, (ROWS, length), generator=generator)
    end = config.eos_token_id
    if config.is_encoder_decoder and isinstance(end, int):
        ids[:, -1] = end  # encoder-decoders classify by the state at the end token
    return _complete(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _complete(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """A decoder's first tokens, for models that generate and were given no target: its start token, then the source."""
    import torch

    if model.config.is_encoder_decoder and model.can_generate() and "decoder_input_ids" not in batch:
        start = model.config.get_text_config().decoder_start_token_id
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        first = torch.full((len(batch["input_ids"]), 1), 0 if start is None else start)
        batch["decoder_input_ids"] = torch.cat([first, batch["input_ids"][:, :7].remainder(vocabulary)], 1)
    return batch


def reopened(adapted: Adapted, rows: Any, collate: Callable[[list[Any]], Any], place: Path) -> None:
    """Write the adapter, read it back, put it on the backbone anew, and compare the logits bit for bit.

    The second model shares every frozen tensor with the live one and starts from nothing for all that trains, so it
    takes the memory of the trained tensors alone; the live model is not touched. That the backbone is the one which
    the adapter names is the fingerprint's word.

    Beside a model that is divided over processes no second one can stand: there the live one is filled with nothing
    and then with what was read, and has its own weights again afterwards. All processes call this.

    Args:
        adapted: after training.
        rows: prepared rows; the first few are answered.
        collate: makes a batch of them.
        place: an existing folder in which the adapter is written and removed again.

    Raises:
        ContractError: other tensors or other logits; rows and tensors are named.
        NumbersError, FolderError, DiskError: what writing and reading refuse.
    """
    import torch

    from adapters import ranks, sharded

    batch = dict(collate(list(islice(iter(rows), FEW))))
    numbers = [int(number) for number in batch.pop("row", range(FEW))]
    batch.pop("labels", None)
    device = adapted.model.device
    batch = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
    if sharded.is_divided(adapted):
        _reopened_in_place(adapted, batch, numbers, place)
    else:
        ranks.by_first(lambda: _reopened_beside(adapted, batch, numbers, place))


def _reopened_beside(adapted: Adapted, batch: dict[str, Any], numbers: list[int], place: Path) -> None:
    """The check by a second model, in one process."""
    import torch

    from adapters import readout, storage

    with contextlib.ExitStack() as stack:
        with disk.writing(place):
            stage = tempfile.TemporaryDirectory(prefix=".staging-reopened-", dir=place, ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(stage))
            storage.write(adapted, folder)
        again = _anew(adapted, folder)
    saved, live = again.state(), adapted.state()
    other = [key for key in live if not torch.equal(saved[key], live[key].to(saved[key]))]
    # Of a large vocabulary what its output layer reads stands for the logits, which would not fit; the layer's own
    # tensors are the live ones, or were compared above.
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    states = ids is not None and readout.large(adapted.model, ids.numel())
    wanted, found = (
        [part.cpu() for part in ([readout.last_states(net, batch)] if states else outputs(net, [batch]))]
        for net in (_bare(adapted.model), again.model)
    )
    _compared(wanted, found, numbers, other)


def _reopened_in_place(adapted: Adapted, batch: dict[str, Any], numbers: list[int], place: Path) -> None:
    """The same of a divided model, in all processes, which see the folder."""
    import torch

    from adapters import exchange, ranks, sharded, shards, storage
    from adapters.manifest import read_manifest, read_tensors

    folder = place / ".staging-reopened"

    def written() -> None:
        with disk.writing(place):
            shards.remove(folder)
            folder.mkdir()
            storage.write(adapted, folder)

    wanted = [part.cpu() for part in outputs(adapted.model, [batch])]
    kept = {key: tensor.clone() for key, tensor in adapted.state().items()}
    with sharded.gathered(adapted):
        ranks.by_first(written)
    try:
        saved = exchange.in_all(lambda: read_tensors(folder, read_manifest(folder)))
        with torch.no_grad():
            for tensor in adapted.state().values():
                ranks.part(tensor).fill_(math.nan)
        storage.put(adapted, saved, str(folder))
        live = {key: ranks.part(tensor) for key, tensor in adapted.state().items()}
        other = [key for key, tensor in live.items() if not torch.equal(tensor, ranks.part(kept[key]))]
        found = [part.cpu() for part in outputs(adapted.model, [batch])]
    finally:
        storage.put(adapted, kept, "the run's own weights")
        ranks.by_first(lambda: shards.remove(folder))
    exchange.in_all(lambda: _compared(wanted, found, numbers, other))


def _compared(wanted: Sequence[Any], found: Sequence[Any], numbers: Sequence[int], other: Sequence[str]) -> None:
    """Refuse logits or tensors that differ.

    Args:
        wanted, found: outputs of the trained model, and of the adapter that was read back.
        numbers: the rows that they answer.
        other: trained tensors that came back as others.
    """
    import torch

    differing = [
        number
        for index, number in enumerate(numbers)
        for one, two in zip(wanted, found, strict=True)
        if one.shape[0] == len(numbers) and not torch.equal(one[index], two[index])
    ]
    same = bool(wanted) and all(torch.equal(one, two) for one, two in zip(wanted, found, strict=True))
    if other or not same:
        apart = max((float((a - b).abs().max()) for a, b in zip(wanted, found, strict=True)), default=math.nan)
        raise ContractError(
            message(
                "saved and opened again the adapter does not answer as the trained model does",
                where=f"rows {some(dict.fromkeys(differing) or numbers)}",
                expected="the same logits, bit for bit",
                found=f"{apart:.2g} apart" + (f"; other tensors: {some(other)}" if other else ""),
                remedy="Something that the adapter does not hold has changed in the model.",
            )
        )


def _bare(model: Any) -> Any:
    """The graph of a model around the same tensors, without what accelerate has put before its forward pass."""
    from adapters.anatomy import copied

    bare = copied(model, lambda tensor: tensor)
    for name in ("forward", "_original_forward"):
        vars(bare).pop(name, None)
    return bare


def _anew(adapted: Adapted, folder: Path) -> Adapted:
    """The adapter of a folder on the frozen tensors of a live model."""
    import torch

    from adapters import offload, pooling, reading, storage
    from adapters.adapt import live_names
    from adapters.anatomy import never_saved, own_name
    from adapters.manifest import read_manifest, read_tensors

    document = read_manifest(folder)
    where = str(folder)
    strategy = storage.strategy_of(document, where)
    net = _bare(adapted.model)
    adapted.strategy.strip(net)
    read = reading.of(storage.task_of(document, where))
    if read.elsewhere or pooling.placed(net).elsewhere:
        pooling.place(net, read.pooling, read.layer)
    with torch.random.fork_rng(devices=[]):
        trained = (strategy.apply(net) | live_names(net, adapted.head)) - never_saved(net)
    trained = {name for name in trained if own_name(name) not in adapted.record.unread}
    grown = adapted.vocabulary.axes if adapted.vocabulary is not None else {}
    trained |= live_names(net, grown)
    offload.settle(net, trained)
    if trained != set(adapted.trained):
        raise ContractError(
            message(
                "the saved strategy trains other tensors",
                where=f"strategy {strategy.name!r}",
                expected=f"{len(adapted.trained)} tensors",
                found=f"differing in {some(sorted(trained ^ set(adapted.trained)))}",
            )
        )
    for name, parameter in net.named_parameters():
        if name in trained:
            empty = torch.full_like(parameter.detach(), math.nan)
            axis = grown.get(own_name(name))
            if axis is not None:
                empty.copy_(parameter.detach())
                empty.index_fill_(axis, adapted.added_ids(empty), math.nan)
            parameter.data = empty
    again = dataclasses.replace(adapted, model=net, strategy=strategy, chosen=tuple(sorted(trained)))
    storage.put(again, read_tensors(folder, document), where)
    return again


def main(request: str) -> None:
    """Read a request as JSON and print the comparison as the last line of standard output."""
    print(json.dumps(compare(**json.loads(request))))
