"""A picture of numbers by block and kind of module: shares of the backbone, or cosines."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from adapters import disk
from adapters.errors import MissingPackageError, RequestError, message

FORMATS: Final = (".png", ".svg")
WRITTEN: Final = 26  # blocks up to which each cell has its number
NAMED: Final = 40  # blocks up to which each has its name
BESIDE: Final = 16  # numbers outside of the blocks that are shown
EMPTY: Final = "#f4f4f4"


@final
@dataclass(frozen=True)
class Scale:
    """What the numbers are.

    Attributes:
        name: below the key.
        signed: from -1 to 1 around 0; else from 0 up.
        percent: numbers are shares, shown as percents.
    """

    name: str
    signed: bool = False
    percent: bool = False

    def text(self, value: float) -> str:
        """A number as a cell shows it."""
        if not self.percent:
            return f"{value:.2f}"
        return f"{100 * value:.0f}" if value >= 0.1 else f"{100 * value:.1f}" if value >= 0.01 else f"{100 * value:.2g}"


def check(file: str | Path) -> Path:
    """A picture's name, before anything is measured for it.

    Raises:
        RequestError: neither .png nor .svg, or no folder to put it in.
        MissingPackageError: matplotlib is not installed.
    """
    place = Path(file).expanduser()
    if place.suffix.lower() not in FORMATS:
        raise RequestError(message("a picture of another kind", where=str(place), expected=" or ".join(FORMATS)))
    if not place.parent.is_dir() or place.is_dir():
        raise RequestError(message("no place for a picture", where=str(place), expected="a file in a folder that is"))
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError(
            message("a picture needs matplotlib", where=str(place), remedy="pip install 'holdfast[report]'.")
        )
    return place


def draw(
    cells: Mapping[tuple[str, str], float],
    beside: Sequence[tuple[str, float]],
    file: str | Path,
    *,
    title: str,
    scale: Scale,
) -> Path:
    """Write a picture: blocks upwards, kinds of module across, what stands outside of the blocks below.

    Args:
        cells: (block, kind) -> number; blocks from the bottom, in the order in which they come.
        beside: names and numbers outside of the blocks; the greatest are shown.
        file: .png or .svg, replaced whole.
        title: above the picture.
        scale: what the numbers are.

    Raises:
        RequestError, MissingPackageError: as `check`; nothing to draw.
        DiskError: the disk refuses.
    """
    place = check(file)
    if not cells and not beside:
        raise RequestError(message("there is nothing to draw", where=str(place)))
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks = list(dict.fromkeys(block for block, _ in cells))
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    outside = sorted(beside, key=lambda entry: -abs(entry[1]))[:BESIDE]
    tall = (0.34 if len(blocks) <= WRITTEN else 0.16) * len(blocks)
    low = 0.3 * len(outside) + (0.3 if outside else 0.0)
    names = [_short(kind) for kind in kinds]
    below = 0.055 * max(map(len, names), default=0)  # inches that slanted names take
    wide = max(7.5, 3.2 + 0.62 * len(kinds))
    figure = Figure(figsize=(wide, max(2.6, tall + low + below + 1.3)), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [part for part in (tall + below, low) if part]
    axes = figure.subplots(len(ratios), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    values = [*cells.values(), *(value for _, value in outside)]
    span = {"vmin": -1.0, "vmax": 1.0} if scale.signed else {"vmin": 0.0, "vmax": max(values) or 1.0}
    look = {"cmap": "RdBu_r" if scale.signed else "YlGnBu", **span}
    image: Any = None
    if cells:
        grid = [[cells.get((block, kind), float("nan")) for kind in kinds] for block in blocks]
        image = _panel(axes[0], grid, look, scale, written=len(blocks) <= WRITTEN)
        axes[0].set_xticks(range(len(kinds)), names, rotation=35, horizontalalignment="right", rotation_mode="anchor")
        every = 1 if len(blocks) <= NAMED else 5
        shown, one = _stacked(blocks)
        axes[0].set_yticks(range(0, len(blocks), every), shown[::every])
        axes[0].set_ylabel(f"block of {one}" if one else "block")
        axes[0].tick_params(length=0, labelsize=8 if len(blocks) <= WRITTEN else 7)
        axes[0].invert_yaxis()  # the first block at the bottom, as a model is drawn
    if outside:
        image = _panel(axes[-1], [[value] for _, value in outside], look, scale, written=True)
        axes[-1].set_yticks(range(len(outside)), [name for name, _ in outside])
        axes[-1].set_xticks([])
        axes[-1].tick_params(length=0, labelsize=8)
        hidden = len(beside) - len(outside)
        axes[-1].set_title("outside the blocks" + (f", {hidden} more not shown" if hidden else ""), fontsize=8)
    key = figure.colorbar(image, ax=list(axes), shrink=0.6, pad=0.02, aspect=20 if len(blocks) <= WRITTEN else 40)
    key.set_label(scale.name, fontsize=8)
    key.ax.tick_params(labelsize=8)
    if scale.percent:
        key.ax.yaxis.set_major_formatter(lambda value, _place: f"{100 * value:g} %")
    key.outline.set_visible(False)
    figure.suptitle(title, fontsize=10, x=0.01, horizontalalignment="left")
    stage = place.with_name(f".{place.name}.{os.getpid()}")
    how: dict[str, Any] = {"metadata": {"Date": None}} if place.suffix.lower() == ".svg" else {"dpi": 110}
    with disk.writing(place, "Nothing was changed. Make room, or give another file."):
        try:
            figure.savefig(stage, format=place.suffix[1:].lower(), **how)
            stage.replace(place)
        finally:
            stage.unlink(missing_ok=True)
    return place


def _panel(axis: Any, grid: Sequence[Sequence[float]], look: Mapping[str, Any], scale: Scale, *, written: bool) -> Any:
    """One grid of cells, with or without their numbers; a number that there is not is a pale cell."""
    axis.set_facecolor(EMPTY)
    image = axis.imshow(grid, aspect="auto", interpolation="nearest", **look)
    for side in axis.spines.values():
        side.set_visible(False)
    for row, line in enumerate(grid):
        for column, value in enumerate(line):
            if written and value == value:
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
                axis.text(column, row, scale.text(value), **_CELL, color="white" if dark else "#222222")
    return image


_CELL: Final = {"fontsize": 7, "horizontalalignment": "center", "verticalalignment": "center"}


def _short(kind: str) -> str:
    """A kind of module without what all weights have."""
    return kind.removesuffix(".weight")


def _stacked(blocks: Sequence[str]) -> tuple[list[str], str]:
    """Blocks by their numbers alone where there is one stack, which is named then; else as they are."""
    stacks = {block.rpartition(".")[0] for block in blocks}
    if len(stacks) == 1:
        return [block.rpartition(".")[2] for block in blocks], stacks.pop()
    return list(blocks), ""
