"""Pictures to pixels: varied at random where they train, then made by the model's own image processor.

Sizes, means and deviations are the processor's. Variation is Pillow's and numpy's alone, and drawn from a generator
that the caller seeds for each row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapters.data import need_column
from adapters.errors import DataError, RequestError, message
from adapters.images import opened
from adapters.modes import evaluating

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedModel

AUGMENTS = {
    "none": "every epoch sees the pictures as they are",
    "flip": "left and right are swapped in half of the cases",
    "crop": "a part of the picture; of a small one a shifted view",
    "standard": "crop, then flip",
}
SMALL = 64  # pixels: a picture with a side up to this is shifted, a larger one cropped
SHIFT = 8  # a small picture moves by up to an eighth of its sides (He et al., 2016: 4 of 32 pixels)
AREA = (0.25, 1.0)  # share of a large picture that is kept
RATIO = (3 / 4, 4 / 3)  # its width over its height, beside the picture's own (Szegedy et al., 2015)
TRIES = 10  # draws of a part that lies inside the picture, before the whole is taken
REMEDY = (
    "Take the processor that belongs to the model, or one of the model's size: the file preprocessor_config.json, or "
    "processor=AutoImageProcessor.from_pretrained(folder, backend='pil', size=...)."
)
MODES = {1: "L", 3: "RGB"}  # channels of a model -> Pillow's mode


def need_processor(processor: Any) -> None:
    """Refuse to prepare pictures without an image processor.

    Raises:
        RequestError: there is none.
    """
    if processor is None:
        raise RequestError(
            message(
                "pictures need an image processor",
                where="processor",
                remedy="Pass processor=AutoImageProcessor.from_pretrained(..., backend='pil').",
            )
        )


def mode_of(model: PreTrainedModel) -> str:
    """Pillow's mode for the channels that the model's first convolution reads.

    Raises:
        RequestError: neither one channel nor three.
    """
    from torch import nn

    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    if channels not in MODES:
        raise RequestError(
            message(
                "a model for pictures of another kind",
                where=type(model).__name__,
                expected="1 channel (grey) or 3 (red, green, blue)",
                found=f"{channels} channels",
                remedy="Prepare the rows yourself: a column 'pixel_values'.",
            )
        )
    return MODES[channels]


def augmented(picture: Image, how: str, generator: np.random.Generator) -> Image:
    """A picture varied at random, of the same size and mode.

    Args:
        picture: 8 bits a channel.
        how: one of `AUGMENTS`.
        generator: every choice is drawn from it.

    Source: random crops after Szegedy et al. 2015, shifted views after He et al. 2016.
    """
    from PIL.Image import Transpose

    if how in ("crop", "standard"):
        picture = (_shifted if min(picture.size) <= SMALL else _cropped)(picture, generator)
    if how in ("flip", "standard") and generator.random() < 0.5:
        picture = picture.transpose(Transpose.FLIP_LEFT_RIGHT)
    return picture


def _shifted(picture: Image, generator: np.random.Generator) -> Image:
    """The picture moved by up to an eighth of its sides; what comes in from outside is black."""
    width, height = picture.size
    across, down = (int(generator.integers(-(side // SHIFT), side // SHIFT + 1)) for side in (width, height))
    return picture.crop((across, down, across + width, down + height))


def _cropped(picture: Image, generator: np.random.Generator) -> Image:
    """A part of the picture, brought back to the picture's size."""
    from PIL.Image import Resampling

    width, height = picture.size
    for _ in range(TRIES):
        area = width * height * generator.uniform(*AREA)
        ratio = width / height * math.exp(generator.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = int(generator.integers(width - across + 1)), int(generator.integers(height - down + 1))
            box = (left, top, left + across, top + down)
            return picture.resize((width, height), Resampling.BILINEAR, box=box)
    return picture


def made(pictures: Sequence[Image], processor: Any, model: PreTrainedModel) -> dict[str, Tensor]:
    """The processor's model inputs for these pictures, in the model's dtype: pixel_values, shape (rows, channels,
    height, width), and whatever else the processor gives.
    """
    inputs: dict[str, Tensor] = dict(processor(images=list(pictures), return_tensors="pt"))
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def refuse_unfit(rows: Dataset, processor: Any, model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Try the first picture on processor and model, so that sizes that do not fit speak before training.

    Args:
        rows: with a column "image".
        processor, model: that are to read them.
        inputs: further arguments of the model.

    Raises:
        RequestError: with the processor's or the model's own reason.
        DataError: pictures of several sizes where the processor does not bring them to one.
    """
    mode = mode_of(model)
    first = opened(rows[0]["image"], "row 0").convert(mode)
    where = f"{type(processor).__name__} for {type(model).__name__}"
    try:
        batch = made([first], processor, model)
        sizes = {made([first.resize(size)], processor, model)["pixel_values"].shape for size in ((48, 72), (72, 48))}
    except (ValueError, TypeError, KeyError) as fault:
        raise RequestError(
            message("the image processor cannot take the pictures", where=where, found=_short(fault), remedy=REMEDY)
        ) from fault
    _try(batch, model, inputs, where, REMEDY)
    if len(sizes) > 1:
        _refuse_sizes(rows, where)


def _try(batch: Mapping[str, Tensor], model: PreTrainedModel, inputs: Mapping[str, Any], where: str, cure: str) -> None:
    """One forward pass in eval mode, for the model's own word on these pixels."""
    import torch

    try:
        with evaluating(model), torch.inference_mode():
            model(**{name: value.to(model.device) for name, value in batch.items()}, **inputs)
    except (ValueError, RuntimeError) as fault:
        raise RequestError(
            message(
                "the model does not take these pixels",
                where=where,
                found=f"{'x'.join(map(str, batch['pixel_values'].shape[1:]))}: {_short(fault)}",
                remedy=cure,
            )
        ) from fault


def _refuse_sizes(rows: Dataset, where: str) -> None:
    """Pictures of several sizes cannot stand in one batch where the processor keeps their sizes."""
    seen: tuple[int, int] | None = None
    for number, value in enumerate(rows["image"]):
        size = opened(value, f"row {number}").size
        seen = seen or size
        if size != seen:
            raise DataError(
                message(
                    "pictures of several sizes, and the processor does not bring them to one",
                    where=f"row {number}, column 'image', {where}",
                    expected=f"{seen[0]} x {seen[1]} pixels as in row 0",
                    found=f"{size[0]} x {size[1]}",
                    remedy="Take an image processor with do_resize and a size of height and width.",
                )
            )


def taken(rows: Dataset, model: PreTrainedModel, inputs: Mapping[str, Any], *, labelled: bool) -> Dataset:
    """A set that holds pixels already: checked, then taken as it is, with lengths and row numbers.

    Args:
        rows: with pixel_values, shape (channels, height, width) each.
        model, inputs: that is to read them, and its further arguments.
        labelled: a column "labels" must be there.

    Raises:
        DataError: rows of several shapes, values that are not finite, no labels where they are needed.
        RequestError: pixels that the model does not take, with its own reason.
    """
    import numpy as np
    import torch

    if labelled:
        need_column(rows, "labels")
    expected: tuple[int, ...] | None = None
    for number, row in enumerate(rows.select_columns("pixel_values").with_format("numpy")):
        pixels = row["pixel_values"]
        expected = expected or pixels.shape
        if (
            pixels.dtype.kind not in "fiu"
            or pixels.ndim != 3
            or pixels.shape != expected
            or not np.isfinite(pixels).all()
        ):
            raise DataError(
                message(
                    "prepared pixels that the model does not take",
                    where=f"row {number}, column 'pixel_values'",
                    expected="finite numbers, (channels, height, width), the same for every row",
                    found=f"{pixels.dtype}, {pixels.shape}",
                )
            )
    first = torch.as_tensor(rows[0]["pixel_values"]).to(model.dtype)
    _try({"pixel_values": first[None]}, model, inputs, "column 'pixel_values'", "Prepare the rows for this model.")
    rows = rows.remove_columns([name for name in rows.column_names if name not in ("pixel_values", "labels")])
    return rows.add_column("length", [1] * len(rows)).add_column("row", list(range(len(rows))))


def noise(count: int, model: PreTrainedModel, *, size: int = 64) -> list[Image]:
    """Pictures of random pixels in the model's mode, for checks that need no data."""
    import numpy as np
    from PIL import Image as pillow

    generator = np.random.default_rng(0)
    mode = mode_of(model)
    shape = (size, size) if mode == "L" else (size, size, 3)
    return [pillow.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]


def _short(fault: Exception) -> str:
    return " ".join(str(fault).split())[:300]
