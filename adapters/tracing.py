"""An adapted model as a graph: merged, its head where it reads, traced with made-up inputs of its processor's names."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from adapters import pooling
from adapters.contracts import Adapted
from adapters.errors import RequestError, message
from adapters.manifest import is_standalone
from adapters.merge import merge, merge_on_disk
from adapters.pixels import noise
from adapters.predict import prepared_rows, whole
from adapters.storage import load
from adapters.tokens import limit_of

OUTPUTS: Final = {  # of the tasks whose models answer in one pass
    "text-classification": ("logits",),
    "token-classification": ("logits",),
    "image-classification": ("logits",),
    "question-answering": ("start_logits", "end_logits"),
}
INPUTS: Final = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
TRACED: Final = (2, 11)  # rows and tokens of the batch that a model is traced with
TRIED: Final = ((1, 5), (3, 24), (17, 64))  # of those on which every graph is tried
INSTEAD: Final = "Deploy the transformers folder: adapters merge."


# ---------------------------------------------------------------------- the model


def opened(adapter: Path, document: Mapping[str, Any], base: str | Path | None) -> tuple[Adapted, list[Tensor] | None]:
    """The merged model in float32, its head where it reads; and the adapted one's outputs on made-up inputs.

    An adapter over 4 bits is merged on disk, where its answers are compared; then there are none.
    """
    adapted = load(adapter, base)
    if adapted.model.config.is_encoder_decoder:
        raise RequestError(
            message(
                "an encoder-decoder is no single graph",
                where=type(adapted.model).__name__,
                expected="an encoder, or a decoder with a head",
                remedy=INSTEAD,
            )
        )
    if adapted.processor is None:
        raise RequestError(
            message(
                "a graph takes what a processor makes, and the adapter has none",
                where=str(adapter),
                remedy="Adapt the model with its processor (processor=...), and save again.",
            )
        )
    own = None
    if adapted.storage.quantization is None:
        model: Any = adapted.model
        model.float()
        own = answers(adapted.model, [made_up(adapted, *shape) for shape in TRIED], document)
        read = pooling.placed(adapted.model)
        pooling.strip(adapted.model)  # a merge refuses what a saved model would forget; here nothing is saved
        pooling.place(merge(adapted), read.pooling, read.layer)
    else:
        adapted = dataclasses.replace(adapted, model=_unpacked(adapter, base, adapted))
    if "use_cache" in adapted.model.config.to_dict():
        adapted.model.config.use_cache = False
    return adapted, own


def _unpacked(adapter: Path, base: str | Path | None, adapted: Adapted) -> Any:
    import transformers

    with tempfile.TemporaryDirectory() as place:
        merged = Path(place) / "merged"
        merge_on_disk(adapter, merged, base=base, dtype="float32")
        if is_standalone(merged):
            beside: Any = load(merged).model
            return beside.float()
        auto: Any = getattr(transformers, adapted.task.auto_class)
        return auto.from_pretrained(merged, dtype=torch.float32, trust_remote_code=False).eval()


# ---------------------------------------------------------------------- inputs


def _names(adapted: Adapted) -> tuple[str, ...]:
    """The inputs that the processor gives and the model takes, in their order."""
    given = adapted.processor.model_input_names
    pixels = adapted.model.main_input_name == "pixel_values"
    return tuple(name for name in INPUTS if name in given and (name == "pixel_values") == pixels)


def made_up(adapted: Adapted, rows: int, length: int) -> dict[str, Any]:
    """Inputs at random, rows of several lengths, padded; of pictures noise, as the processor makes it."""
    if adapted.model.main_input_name == "pixel_values":
        prepared = prepared_rows(adapted, whole(adapted.task, noise(rows, adapted.model)), labelled=False)
        features = [prepared[index] for index in range(rows)]
        batch = adapted.task.collate(features, adapted.model, adapted.processor)
        return {name: value for name, value in batch.items() if name != "row"}
    config = adapted.model.config.get_text_config()
    length = min(length, limit_of(None, adapted.processor, adapted.model))
    generator = torch.Generator().manual_seed(rows)
    low, pad = min(8, config.vocab_size - 1), config.pad_token_id or 0
    ids = torch.randint(low, config.vocab_size, (rows, length), generator=generator)
    ids[ids == pad] = low if low != pad else low - 1
    mask = (torch.arange(length) < (length - torch.arange(rows) % 4)[:, None]).long()
    kinds = torch.arange(length).expand(rows, length) >= length // 2
    several = config.to_dict().get("type_vocab_size", 1) > 1
    made = {
        "input_ids": ids.masked_fill(mask == 0, pad),
        "attention_mask": mask,
        "token_type_ids": kinds.long() * mask if several else torch.zeros_like(ids),
    }
    return {name: made[name] for name in _names(adapted)}


# ---------------------------------------------------------------------- the graph


@final
class _Answering(nn.Module):
    """A model as a function of tensors in their order."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], outputs: Sequence[str], fixed: Mapping[str, Any]):
        super().__init__()
        self.model = model
        self.inputs, self.outputs, self.fixed = tuple(inputs), tuple(outputs), dict(fixed)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The outputs, each by its place."""
        found = self.model(**dict(zip(self.inputs, values, strict=True)), **self.fixed)
        return tuple(found[name] for name in self.outputs)


def traced(adapted: Adapted, document: Mapping[str, Any], file: Path, *, external: bool) -> int:
    """Write the graph of a model; returns its opset.

    Raises:
        RequestError: torch cannot export it.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    batch = made_up(adapted, *TRACED)
    inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    fixed = {name: value for name, value in batch.items() if name not in inputs}
    outputs = OUTPUTS[document["task"]["name"]]
    net: Any = adapted.model
    rows, places = torch.export.Dim("batch"), torch.export.Dim("sequence")
    axes = tuple({0: rows} if name == "pixel_values" else {0: rows, 1: places} for name in inputs)
    model = _Answering(net.eval(), tuple(inputs), outputs, fixed)
    try:
        with hushed(), torch.no_grad():
            program = torch.onnx.export(
                model,
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=(axes,),
                dynamo=True,
                verbose=False,
            )
    except Exception as fault:  # whatever the exporter, or the model's own code under it, could not do
        raise RequestError(
            message(
                "torch cannot export this model to ONNX",
                where=type(adapted.model).__name__,
                found=" ".join(f"{type(fault).__name__}: {fault}".split())[:300],
                remedy=INSTEAD,
            )
        ) from fault
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # line by line, where on this machine the model's code lies
    program.save(file, external_data=external)
    opset: int = program.model.opset_imports[""]
    return opset


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """The exporter talks of packages that it would know, and of its own deprecated parts."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def answers(model: Any, batches: Sequence[Mapping[str, Any]], document: Mapping[str, Any]) -> list[Tensor]:
    """The outputs of a model or a graph for each batch, without what stands at padding."""
    if isinstance(model, nn.Module):
        model.eval()
    found: list[Tensor] = []
    with torch.inference_mode():
        for batch in batches:
            found += seen(model(**batch), batch, document)
    return found


def seen(outputs: Any, batch: Mapping[str, Any], document: Mapping[str, Any]) -> list[Tensor]:
    """The outputs where there is a token; those at padding mean nothing."""
    names = OUTPUTS[document["task"]["name"]]
    logits = outputs[names[0]].float()
    if names != ("logits",):  # of places, among which the answer is
        rows = [outputs[name].float() for name in names]
        return [row[seen] for part in rows for row, seen in zip(part, batch["attention_mask"].bool(), strict=True)]
    return [logits[batch["attention_mask"].bool()] if logits.ndim == 3 else logits]
