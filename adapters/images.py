"""Pictures: folders of them as rows, and one picture opened as RGB.

Every picture is opened the same way: turned as its EXIF orientation says, the first frame of an animation, 16 bits
scaled to 8, then RGB (transparency is dropped). Larger than Pillow's own limit (about 89 million pixels) is refused.
"""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import DataError, MissingPackageError, RequestError, message

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

SUFFIXES = frozenset(
    ("avif", "bmp", "gif", "heic", "heif", "jfif", "jpeg", "jpg", "pbm", "pgm", "png", "ppm", "tif", "tiff", "webp")
)
METADATA = ("metadata.csv", "metadata.jsonl")
# Columns of a table that may hold the paths of pictures; the first that does becomes the pictures.
PATHS = ("image", "image_path", "picture", "photo", "img", "file_name", "filename", "file", "path", "filepath")
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
WIDE = ("I", "F")  # 32 bits a pixel: there is no telling what is white
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
CHUNK = 256  # pictures in memory at once while they are checked
SHOWN = 5  # names that a message lists at most


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as fault:
        raise MissingPackageError(
            message("pictures need Pillow", where="data", remedy='Install it: pip install "holdfast[vision]".')
        ) from fault
    return PIL


# ---------------------------------------------------------------------- folders


def layout(folder: Path, names: Mapping[str, str]) -> dict[str, Path]:
    """The parts of an image folder: part -> its folder; empty where the folder holds no pictures.

    A part is a folder with class folders, with metadata.csv or metadata.jsonl, or with pictures alone.

    Args:
        folder: root/class/x.png, root/train/class/x.png, or either with a metadata file instead of classes.
        names: folder name -> part, for the folders that are parts.

    Raises:
        RequestError: part folders beside others, or two for one part.
    """
    if _metadata(folder) or any(_is_picture(child) for child in folder.iterdir()):
        return {"train": folder}
    parts = [child for child in _folders(folder) if _is_part(child)]
    odd = [child.name for child in parts if child.name not in names]
    # A folder "train" among others that are no parts is a class of vehicles.
    if odd and any(_is_picture(file) for child in parts for file in child.iterdir()):
        return {"train": folder}
    found: dict[str, Path] = {}
    for child in parts:
        if odd or names[child.name] in found:
            raise RequestError(
                message(
                    f"the folder {odd[0]!r} is no known part" if odd else f"two folders for {names[child.name]!r}",
                    where=str(folder),
                    expected=f"folders {', '.join(names)}, or folders of pictures named by class",
                    found=", ".join(other.name for other in parts[:8]),
                )
            )
        found[names[child.name]] = child
    return found


def _folders(folder: Path) -> list[Path]:
    return [child for child in sorted(folder.iterdir()) if child.is_dir() and not child.name.startswith(".")]


def _is_part(folder: Path) -> bool:
    """Whether a folder holds pictures, itself or a folder deeper, or says where they are."""
    inside = [folder, *_folders(folder)]
    return bool(_metadata(folder)) or any(_is_picture(file) for place in inside for file in place.iterdir())


def _metadata(folder: Path) -> list[Path]:
    return [folder / name for name in METADATA if (folder / name).is_file()]


def _is_picture(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in SUFFIXES and not path.name.startswith(".") and path.is_file()


def metadata_of(folder: Path) -> Path | None:
    """The metadata file of a part.

    Raises:
        RequestError: two of them.
    """
    found = _metadata(folder)
    if len(found) > 1:
        raise RequestError(message("two metadata files", where=str(folder), found=" and ".join(METADATA)))
    return found[0] if found else None


def from_classes(folder: Path) -> tuple[Dataset, list[str]]:
    """Rows of image and label from class folders; of image alone where the pictures stand in no class folder.

    Returns:
        The rows, by class and name in order, and remarks: files that are no pictures.

    Raises:
        DataError: a class without pictures, folders inside a class, pictures beside class folders.
        MissingPackageError: Pillow is not installed.
    """
    _pillow()
    from datasets import Dataset, Features, Image, Value

    children = [child for child in sorted(folder.iterdir()) if not child.name.startswith(".")]
    loose = [str(child) for child in children if _is_picture(child)]
    classes = [child for child in children if child.is_dir()]
    others = [child.name for child in children if child.is_file() and not _is_picture(child)]
    if loose and classes:
        raise DataError(
            message(
                "pictures beside the class folders",
                where=str(folder),
                found=f"{len(loose)}, e.g. {Path(loose[0]).name}",
                remedy="Put every picture into its class's folder, or write a metadata.csv.",
            )
        )
    paths: list[str] = list(loose)
    labels: list[str] = []
    for child in classes:
        files = [file for file in sorted(child.iterdir()) if not file.name.startswith(".")]
        pictures = [str(file) for file in files if _is_picture(file)]
        nested = [file.name for file in files if file.is_dir()]
        if nested or not pictures:
            raise DataError(
                message(
                    f"the class {child.name!r} holds {'a folder' if nested else 'no pictures'}",
                    where=str(child),
                    expected="pictures",
                    found=", ".join(nested[:SHOWN]) or ", ".join(file.name for file in files[:SHOWN]) or "nothing",
                )
            )
        others += [f"{child.name}/{file.name}" for file in files if not _is_picture(file)]
        paths += pictures
        labels += [child.name] * len(pictures)
    remarks = [f"{folder}: left out, no pictures: {_listed(others)}"] if others else []
    if loose:
        return Dataset.from_dict({"image": paths}, features=Features({"image": Image()})), remarks
    features = Features({"image": Image(), "label": Value("string")})
    return Dataset.from_dict({"image": paths, "label": labels}, features=features), remarks


def from_metadata(table: Dataset, file: Path) -> tuple[Dataset, list[str]]:
    """Rows of image and the metadata's other columns.

    Args:
        table: the metadata, with a column "file_name": paths from the metadata's folder.
        file: where it stands.

    Returns:
        The rows, and remarks: pictures that the metadata does not name.

    Raises:
        DataError: no column "file_name", a column "image" besides, a file that is not there; with the row.
        MissingPackageError: Pillow is not installed.
    """
    _pillow()
    if "file_name" not in table.column_names or "image" in table.column_names:
        raise DataError(
            message(
                "metadata of another form",
                where=str(file),
                expected="a column 'file_name' and no column 'image'",
                found=", ".join(table.column_names),
            )
        )
    paths = _paths(table, "file_name", file, [file.parent])
    named = {Path(path).resolve() for path in paths}
    others = [path.name for path in sorted(file.parent.rglob("*")) if _is_picture(path) and path.resolve() not in named]
    remarks = [f"{file}: left out, not named there: {_listed(others)}"] if others else []
    return _with_pictures(table, "file_name", paths), remarks


def from_paths(table: Dataset, file: Path) -> Dataset:
    """The rows of a table; where one of its columns holds nothing but names of pictures, they become the pictures.

    Args:
        table: rows of a csv, json or parquet file.
        file: where it stands; paths start at its folder, or at the one that the process works in.

    Raises:
        DataError: a picture that is not there; with the row.
        MissingPackageError: Pillow is not installed.
    """
    column = column_of_paths(table)
    if column is None:
        return table
    _pillow()
    return _with_pictures(table, column, _paths(table, column, file, [file.parent, Path()]))


def column_of_paths(table: Dataset) -> str | None:
    """The column of a table that holds nothing but names of pictures; None where there is none."""
    names = {name.casefold(): name for name in table.column_names}
    column = next((names[name] for name in PATHS if name in names and _names_pictures(table, names[name])), None)
    return None if "image" in table.column_names and column != "image" else column


def _names_pictures(table: Dataset, column: str) -> bool:
    """Whether every value that a text column has ends as the name of a picture does."""
    if getattr(table.features[column], "dtype", None) not in ("string", "large_string"):
        return False
    values = [value for value in table[column] if value]
    return bool(values) and all(Path(value).suffix.lower().lstrip(".") in SUFFIXES for value in values)


def _paths(table: Dataset, column: str, file: Path, starts: Sequence[Path]) -> list[str]:
    """The files that a column names, each found from the first start at which it is there."""
    paths = []
    for number, name in enumerate(table[column]):
        found = next((start / str(name) for start in starts if name and (start / str(name)).is_file()), None)
        if found is None:
            raise DataError(
                message(
                    "there is no such picture",
                    where=f"{file}, row {number}, column {column!r}",
                    found=repr(name),
                    remedy=f"Paths start at the folder of {file.name}.",
                )
            )
        paths.append(str(found))
    return paths


def _with_pictures(table: Dataset, column: str, paths: list[str]) -> Dataset:
    from datasets import Dataset, Features, Image

    rest = table.remove_columns(column)
    features = Features({"image": Image(), **rest.features})
    return Dataset.from_dict({"image": paths, **{c: list(rest[c]) for c in rest.column_names}}, features)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return f"{len(names)} ({shown}{' ...' if len(names) > SHOWN else ''})"


# ---------------------------------------------------------------------- one picture


def opened(value: Any, where: str = "image") -> Image:
    """A picture as RGB, 8 bits a channel.

    Args:
        value: a path, bytes, {"path", "bytes"}, or a PIL image.
        where: row or file, for the message.

    Raises:
        DataError: no picture, a broken or too large one, or one of 32 bits a pixel.
        MissingPackageError: Pillow is not installed.
    """
    pillow = _pillow()
    picture = pillow.ImageOps.exif_transpose(_loaded(value, where))
    if picture.mode in SIXTEEN_BITS:
        import numpy as np

        # Pillow's own conversion cuts every value above 255 to white.
        picture = pillow.Image.fromarray((np.asarray(picture) >> 8).astype("uint8"))
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA")  # straight to RGB, a palette's transparency would be a warning
    made: Image = picture.convert("RGB")
    return made


THUMB = 112  # pixels of a thumbnail's longer side
SMALL = 64  # pictures up to this many pixels are kept as they are, without loss


def thumbnail(value: Any, where: str = "image") -> str:
    """A picture in small, as a data URI that a page can hold.

    Args:
        value, where: as `opened` takes them.
    """
    picture = opened(value, where)
    kind, options = ("png", {}) if max(picture.size) <= SMALL else ("jpeg", {"quality": 72})
    picture.thumbnail((THUMB, THUMB))
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _loaded(value: Any, where: str, *, small: bool = False) -> Image:
    """The picture in its own mode, every byte of its first frame read.

    Args:
        value, where: as `opened` takes them.
        small: a JPEG in an eighth of its size, which is quicker and reads every byte as well.
    """
    pillow = _pillow()
    try:
        picture: Image = _open(value, where)
        width, height = picture.size
        limit = pillow.Image.MAX_IMAGE_PIXELS
        if limit is not None and width * height > limit:
            raise _too_large(where, f"{width} x {height} pixels")
        if small:
            picture.draft(None, (1, 1))
        picture.load()
    except DataError:
        raise
    except pillow.Image.DecompressionBombError as fault:
        raise _too_large(where, str(fault)) from fault
    except (FileNotFoundError, IsADirectoryError) as fault:
        there = isinstance(fault, IsADirectoryError)
        raise DataError(
            message(
                "a folder instead of a picture" if there else "there is no such picture",
                where=where,
                found="" if str(fault.filename) in where else fault.filename,
                remedy="Give it as data: a folder of pictures is a set of rows." if there else "",
            )
        ) from fault
    except Exception as fault:  # Pillow's decoders raise whatever their format's parser meets
        raise DataError(
            message("the picture cannot be read", where=where, found=f"{type(fault).__name__}: {fault}")
        ) from fault
    if picture.mode in WIDE:
        raise DataError(
            message(
                "the picture has 32 bits a pixel",
                where=where,
                expected="8 or 16 bits a channel",
                found=f"mode {picture.mode}",
                remedy="Save it as PNG or JPEG of 8 bits.",
            )
        )
    return picture


def _open(value: Any, where: str) -> Any:
    pillow = _pillow()
    if isinstance(value, pillow.Image.Image):
        return value
    cell = {"bytes": value} if isinstance(value, bytes) else value
    if isinstance(value, str | os.PathLike):
        cell = {"path": value}
    if not isinstance(cell, Mapping) or not (cell.get("bytes") or cell.get("path")):
        raise DataError(
            message("not a picture", where=where, expected="a path, bytes or an image", found=repr(value)[:80])
        )
    return pillow.Image.open(io.BytesIO(cell.get("bytes") or Path(str(cell["path"])).read_bytes()))


def _too_large(where: str, found: str) -> DataError:
    expected = f"at most {_pillow().Image.MAX_IMAGE_PIXELS:,} pixels"
    return DataError(
        message("the picture is too large", where=where, expected=expected, found=found, remedy="Make it smaller.")
    )


def check(rows: Dataset, column: str = "image", seen: Callable[[int], None] | None = None) -> str:
    """Open every picture of a column.

    Args:
        rows, column: where they are.
        seen: told how many more have been opened.

    Returns:
        A remark where not all are plain RGB: how many of each mode, of several frames, or not upright.

    Raises:
        DataError: the first picture that cannot be read, and how many others.
    """
    from datasets import Image

    _pillow()
    if isinstance(rows.features[column], Image):
        rows = rows.cast_column(column, Image(decode=False))
    faults: list[DataError] = []
    modes: Counter[str] = Counter()
    several = turned = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(rows), CHUNK):
            values = rows[start : start + CHUNK][column]
            for found in pool.map(_look, values, range(start, start + len(values))):
                if isinstance(found, DataError):
                    faults.append(found)
                else:
                    modes[found[0]] += 1
                    several += found[1]
                    turned += found[2]
            if seen is not None:
                seen(len(values))
    if faults:
        others = f" {len(faults) - 1} more of {len(rows)} cannot be used." if len(faults) > 1 else ""
        raise DataError(f"{faults[0]}.{others}" if others else str(faults[0])) from faults[0]
    notes = []
    if set(modes) != {"RGB"}:
        notes.append(f"{', '.join(f'{count} {mode}' for mode, count in modes.most_common())}, all read as RGB")
    if several:
        notes.append(f"{several} with several frames, the first is read")
    if turned:
        notes.append(f"{turned} turned upright, as their EXIF orientation says")
    return f"{len(rows)} pictures: {'; '.join(notes)}" if notes else ""


_SEEN: dict[tuple[str, int, int] | None, tuple[str, bool, bool]] = {}  # files that were looked at: each is read once


def _stamp(value: Any, path: str | None) -> tuple[str, int, int] | None:
    """What tells a file from a later one of its name; None for a picture that is no file."""
    if not path or (isinstance(value, Mapping) and value.get("bytes")) or not os.path.isfile(path):
        return None
    status = os.stat(path)
    return os.path.abspath(path), status.st_size, status.st_mtime_ns


def _look(value: Any, row: int) -> tuple[str, bool, bool] | DataError:
    """Mode, several frames, not upright; or what is wrong with a picture."""
    path = value.get("path") if isinstance(value, Mapping) else value if isinstance(value, str) else None
    where = f"row {row}: {path}" if path else f"row {row}"
    try:
        key = _stamp(value, path)
        if key not in _SEEN:
            picture = _loaded(value, where, small=True)
            turned = picture.getexif().get(ORIENTATION, 1) != 1
            found = (picture.mode, getattr(picture, "n_frames", 1) > 1, turned)
            if key is None:
                return found
            _SEEN[key] = found
        return _SEEN[key]
    except DataError as fault:
        return fault
    except Exception as fault:  # a later frame that cannot be read
        return DataError(message("the picture cannot be read", where=where, found=f"{type(fault).__name__}: {fault}"))
