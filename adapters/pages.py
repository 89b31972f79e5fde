"""Safetensors files that are mapped: a tensor that is taken as it lies there is pages of its file, not a copy.

The system takes such pages back when memory runs short, and processes of one machine share them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters import disk, locks, shards, watermark
from adapters.errors import FolderError, RequestError, message

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LOCK = ".lock"


@final
class Files:
    """Files that tensors are taken from, each opened once."""

    def __enter__(self) -> Files:
        self._open: dict[Path, Any] = {}
        return self

    def __exit__(self, *fault: object) -> None:
        for file in self._open.values():
            file.__exit__(*fault)

    def read(self, key: str, file: Path) -> Tensor:
        """A tensor as it lies in its file.

        Args:
            key: its name there.
            file: where it lies.

        Raises:
            FolderError: the file does not hold it whole.
        """
        from safetensors import SafetensorError, safe_open

        try:
            if file not in self._open:
                opener: Callable[..., Any] = safe_open
                self._open[file] = opener(file, framework="pt", device="cpu")
            value: Tensor = self._open[file].get_slice(key)[...]
        except SafetensorError as fault:
            raise FolderError(message("a tensor cannot be read", where=f"{file}: {key}", found=fault)) from fault
        return value

    def paged(self, key: str, file: Path, dtype: torch.dtype, folder: Path | None) -> Tensor:
        """A tensor in a dtype, as pages of a file: its own, or one with it in that dtype.

        Args:
            key: its name in the file.
            file: where it lies.
            dtype: that is wanted.
            folder: for files with tensors in another dtype than their own.

        Raises:
            RequestError: it lies there in another dtype, and there is no such folder.
            DiskError: the disk is full or fails.
        """
        held = self.read(key, file)
        if held.dtype == dtype:
            return held
        wanted = str(dtype).removeprefix("torch.")
        if folder is None:
            raise RequestError(
                message(
                    "weights stay on the disk in the dtype that they have there",
                    where=f"load, {file.name}: {key}",
                    expected=str(held.dtype).removeprefix("torch."),
                    found=wanted,
                    remedy="Leave dtype out, or give a folder for copies in it: load={'offload_folder': ...}.",
                )
            )
        return self.kept(folder, f"{key}.{wanted}", {key: held.to(dtype)})[key]

    def kept(self, folder: Path, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as pages of a file with them, which is written unless it holds them already, value for value.

        Args:
            folder: for such files.
            name: of the file, without its ending.
            tensors: by their names in it.

        Raises:
            DiskError: the disk is full or fails.
        """
        place = folder / f"{name}.safetensors"
        with disk.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with locks.alone(folder / LOCK, wait=True):  # the processes of a machine share one copy
                _write(place, tensors)
                found = {key: self.read(key, place) for key in tensors}  # before another model's stand there
            watermark.trim()  # else the allocator keeps what the copies took, up to the size of them all
        return found


def _write(place: Path, tensors: Mapping[str, Tensor]) -> None:
    """A file with these tensors, unless it stands there already."""
    import torch

    if place.is_file():
        with contextlib.suppress(FolderError), Files() as there:
            found = {key: there.read(key, place) for key in tensors}
            if all(
                found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in tensors.items()
            ):
                return
    fresh = place.with_name(f".{place.name}.new")
    fresh.unlink(missing_ok=True)
    try:
        shards.save_tensors(fresh, tensors, {"format": "pt"})
        fresh.replace(place)  # who has the old one mapped keeps it
    finally:
        fresh.unlink(missing_ok=True)
