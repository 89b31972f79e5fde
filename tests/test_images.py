"""Folders of pictures become rows; every picture is opened before anything is trained, and in one way."""

from __future__ import annotations

import io
import json
import shutil
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Features, Image

from adapters import data, formats, identity, images
from adapters.errors import AdaptersError, DataError, MissingPackageError, RequestError

KNOWN = {"image": "a picture", "label": "its class"}
SIZE = (6, 4)  # width, height in pixels


def picture(colour: Any = (200, 30, 10), mode: str = "RGB", size: tuple[int, int] = SIZE) -> PIL.Image.Image:
    return PIL.Image.new(mode, size, colour)


def write(path: Path, made: PIL.Image.Image | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (made or picture()).save(path, **options)
    return path


def classes(root: Path, count: int = 2) -> Path:
    for label, colour in (("cat", (200, 30, 10)), ("dog", (10, 30, 200))):
        for number in range(count):
            write(root / label / f"{number}.png", picture(colour))
    return root


def refused(kind: type[AdaptersError], source: Any) -> str:
    with pytest.raises(AdaptersError) as caught:
        said(source)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def said(source: Any) -> tuple[dict[str, Dataset], list[str]]:
    """The parts of a source as a task sees them, every picture looked at, and what was said about them."""
    lines: list[str] = []
    splits = data.read(source, lines.append)
    looked = {part: images.check(rows) for part, rows in splits.items()}
    return splits, lines + [f"{part}: {remark}" for part, remark in looked.items() if remark]


def pixels(made: PIL.Image.Image) -> Any:
    return np.asarray(made)


# ---------------------------------------------------------------------- folders


def test_class_folders_are_rows_of_image_and_label(tmp_path: Path) -> None:
    splits, lines = said(str(classes(tmp_path)))
    assert lines == []
    (rows,) = splits.values()
    assert list(splits) == ["train"]
    assert list(rows["label"]) == ["cat", "cat", "dog", "dog"]
    assert isinstance(rows.features["image"], Image)
    assert pixels(images.opened(rows[2]["image"]))[0, 0].tolist() == [10, 30, 200]
    made, remark = formats.arrange(rows, None, KNOWN)
    assert remark == "detected: images, 4 rows"
    assert made.column_names == ["image", "label"]


@pytest.mark.parametrize("name", ["val", "validation", "dev"])
def test_folders_of_parts_hold_class_folders(tmp_path: Path, name: str) -> None:
    for part, count in (("train", 3), (name, 1), ("test", 2)):
        classes(tmp_path / part, count)
    splits = data.read(tmp_path)
    assert {part: len(rows) for part, rows in splits.items()} == {"train": 6, "validation": 2, "test": 4}
    assert set(splits["test"]["label"]) == {"cat", "dog"}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("part", ["", "train"])
def test_metadata_says_labels_and_more(tmp_path: Path, kind: str, part: str) -> None:
    folder = tmp_path / part
    for name in ("a.png", "sub/b.png", "c.png"):
        write(folder / name)
    table = {
        "csv": "file_name,label,place\na.png,cat,home\nsub/b.png,dog,park\n",
        "jsonl": '{"file_name": "a.png", "label": "cat", "place": "home"}\n'
        '{"file_name": "sub/b.png", "label": "dog", "place": "park"}\n',
    }
    (folder / f"metadata.{kind}").write_text(table[kind])
    splits, lines = said(tmp_path)
    rows = splits["train"]
    assert rows.column_names == ["image", "label", "place"]
    assert list(rows["label"]) == ["cat", "dog"]
    assert list(rows["place"]) == ["home", "park"]
    assert rows[1]["image"].size == SIZE
    assert len(lines) == 1
    assert "not named there: 1 (c.png)" in lines[0]


@pytest.mark.parametrize("column", ["image", "path", "Photo"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_of_paths_is_a_table_of_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, column: str
) -> None:
    write(tmp_path / "shots" / "a.png")
    write(tmp_path / "elsewhere" / "b.png")
    write(tmp_path / "c.png")
    monkeypatch.chdir(tmp_path / "elsewhere")
    rows = [("shots/a.png", "cat"), ("b.png", "dog"), (str(tmp_path / "c.png"), "cat")]
    text = {
        "csv": f"{column},label\n" + "".join(f"{name},{label}\n" for name, label in rows),
        "jsonl": "".join(json.dumps({column: name, "label": label}) + "\n" for name, label in rows),
    }
    (tmp_path / f"photos.{kind}").write_text(text[kind])
    found = data.read(tmp_path / f"photos.{kind}")["train"]
    assert found.column_names == ["image", "label"]
    assert [picture.size for picture in found["image"]] == [SIZE] * 3
    assert list(found["label"]) == ["cat", "dog", "cat"]


def test_a_path_that_leads_nowhere_is_told_with_its_row(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    (tmp_path / "photos.csv").write_text("image,label\na.png,cat\nb.png,dog\n")
    said_so = refused(DataError, tmp_path / "photos.csv")
    for word in ("no such picture", "row 1", "'image'", "b.png", "folder of photos.csv"):
        assert word in said_so


def test_texts_that_only_speak_of_pictures_stay_texts(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("file,label\nsee a.png,x\nreport.txt,y\n")
    assert data.read(tmp_path / "rows.csv")["train"].column_names == ["file", "label"]


def test_pictures_without_classes_are_rows_without_labels(tmp_path: Path) -> None:
    write(tmp_path / "b.png")
    write(tmp_path / "a.png")
    rows = data.read(tmp_path)["train"]
    assert rows.column_names == ["image"]
    assert len(rows) == 2
    for name in ("train", "test"):
        write(tmp_path / "parts" / name / "a.png")
    assert {part: rows.column_names for part, rows in data.read(tmp_path / "parts").items()} == {
        "train": ["image"],
        "test": ["image"],
    }


def test_a_class_may_have_the_name_of_a_part(tmp_path: Path) -> None:
    for name in ("train", "bus"):
        write(tmp_path / name / "a.png")
    assert list(data.read(tmp_path)["train"]["label"]) == ["bus", "train"]


def test_hidden_files_go_and_others_are_said(tmp_path: Path) -> None:
    classes(tmp_path)
    for name in (".DS_Store", "cat/.thumbs.png", "cat/notes.txt", "README.md"):
        (tmp_path / name).write_bytes(b"no picture")
    splits, lines = said(tmp_path)
    assert len(splits["train"]) == 4
    assert len(lines) == 1
    assert "2 (README.md, cat/notes.txt)" in lines[0]


def test_folders_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    root = classes(tmp_path / "empty class")
    (root / "bird").mkdir()
    assert "the class 'bird' holds no pictures" in refused(DataError, root)
    root = classes(tmp_path / "nested")
    write(root / "cat" / "more" / "a.png")
    assert "the class 'cat' holds a folder" in refused(DataError, root)
    root = classes(tmp_path / "parts" / "train").parent
    classes(root / "extra")
    assert "'extra' is no known part" in refused(RequestError, root)
    root = classes(tmp_path / "twice" / "val").parent
    classes(root / "dev")
    assert "two folders for 'validation'" in refused(RequestError, root)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("file,label\na.png,cat\n", ("'file_name'", "file, label")),
        ("file_name,image\na.png,cat\n", ("no column 'image'",)),
        ("file_name,label\na.png,cat\nb.png,cat\n", ("no such picture", "row 1", "'b.png'")),
        ("file_name,label\na.png,cat\n,cat\n", ("no such picture", "row 1")),
    ],
)
def test_metadata_that_does_not_fit_is_refused(tmp_path: Path, table: str, words: tuple[str, ...]) -> None:
    write(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(table)
    text = refused(DataError, tmp_path)
    for word in ("metadata.csv", *words):
        assert word in text


def test_two_metadata_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    for kind in ("csv", "jsonl"):
        (tmp_path / f"metadata.{kind}").write_text("file_name\na.png\n")
    assert "two metadata files" in refused(RequestError, tmp_path)


# ---------------------------------------------------------------------- every picture is opened up front

JPEG = io.BytesIO()
PIL.Image.effect_noise((64, 64), 50).save(JPEG, "JPEG")
PNG = io.BytesIO()
PIL.Image.effect_noise((64, 64), 50).save(PNG, "PNG")
BROKEN = {
    "no picture": ("a.png", b"<html>404</html>"),
    "empty": ("a.jpg", b""),
    "a truncated JPEG": ("a.jpg", JPEG.getvalue()[:-200]),
    "a truncated PNG": ("a.png", PNG.getvalue()[:-200]),
    "a kind that Pillow cannot read": ("a.heic", b"\x00\x00\x00\x18ftypheic"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_picture_is_named_with_the_number_of_others(tmp_path: Path, name: str) -> None:
    file, content = BROKEN[name]
    root = classes(tmp_path)
    (root / "cat" / file).write_bytes(content)
    text = refused(DataError, root)
    assert f"cat/{file}" in text
    assert "cannot be read" in text
    assert "more" not in text
    for number in range(3):
        (root / "dog" / f"x{number}_{file}").write_bytes(content)
    assert "3 more of 8 cannot be used" in refused(DataError, root)


def test_a_parquet_file_of_pictures_is_looked_through_as_well(tmp_path: Path) -> None:
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    good = {"bytes": PNG.getvalue(), "path": "a.png"}
    Dataset.from_dict({"image": [good, good], "label": [0, 1]}, features=features).to_parquet(tmp_path / "good.parquet")
    splits, lines = said(tmp_path / "good.parquet")
    assert splits["train"].features == features
    assert lines == ["train: 2 pictures: 2 L, all read as RGB"]
    bad = {"bytes": PNG.getvalue()[:100], "path": "b.png"}
    Dataset.from_dict({"image": [good, bad], "label": [0, 1]}, features=features).to_parquet(tmp_path / "bad.parquet")
    assert "row 1: b.png" in refused(DataError, tmp_path / "bad.parquet")


def test_modes_are_counted_and_said_once(tmp_path: Path) -> None:
    root = classes(tmp_path)
    write(root / "cat" / "grey.png", picture(128, "L"))
    write(root / "cat" / "clear.png", picture((1, 2, 3, 0), "RGBA"))
    write(root / "cat" / "palette.png", picture(0, "P"))
    splits, lines = said(root)
    assert len(splits["train"]) == 7
    assert len(lines) == 1
    assert "7 pictures: 4 RGB, " in lines[0]
    for part in ("1 L", "1 RGBA", "1 P", "all read as RGB"):
        assert part in lines[0]


# ---------------------------------------------------------------------- one picture

MODES = {
    "RGB": ((1, 2, 3), [1, 2, 3]),
    "RGBA": ((1, 2, 3, 0), [1, 2, 3]),
    "L": (77, [77, 77, 77]),
    "LA": ((77, 0), [77, 77, 77]),
    "1": (1, [255, 255, 255]),
    "CMYK": ((0, 0, 0, 0), [255, 255, 255]),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode: str) -> None:
    colour, wanted = MODES[mode]
    made = images.opened(picture(colour, mode))
    assert made.mode == "RGB"
    assert made.size == SIZE
    assert pixels(made)[0, 0].tolist() == wanted


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path: Path, recwarn: Any) -> None:
    made = PIL.Image.new("P", SIZE)
    made.putpalette([9, 8, 7] * 256)
    path = write(tmp_path / "a.png", made, transparency=bytes([0] * 256))
    assert pixels(images.opened(str(path)))[0, 0].tolist() == [9, 8, 7]
    assert not recwarn.list


def test_sixteen_bits_are_scaled_not_cut(tmp_path: Path) -> None:
    values = np.array([[0, 256, 511, 32768, 65535]], dtype=np.uint16)
    path = write(tmp_path / "a.png", PIL.Image.fromarray(values))
    assert PIL.Image.open(path).mode == "I;16"
    assert pixels(images.opened(str(path)))[0, :, 0].tolist() == [0, 1, 1, 128, 255]
    (tmp_path / "cat").mkdir()
    shutil.move(path, tmp_path / "cat" / "a.png")
    assert "1 I;16, all read as RGB" in said(tmp_path)[1][0]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_a_pixel_are_refused(tmp_path: Path, mode: str) -> None:
    write(tmp_path / "cat" / "a.tif", picture(3, mode))
    text = refused(DataError, tmp_path)
    assert "32 bits a pixel" in text
    assert "cat/a.tif" in text


def test_of_an_animation_the_first_frame_is_read_and_said(tmp_path: Path) -> None:
    first, second = picture((255, 0, 0)), picture((0, 0, 255))
    path = write(tmp_path / "cat" / "a.gif", first, save_all=True, append_images=[second])
    assert pixels(images.opened(str(path)))[0, 0].tolist() == [255, 0, 0]
    assert "1 with several frames, the first is read" in said(tmp_path)[1][0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    upright = PIL.Image.new("RGB", (8, 16), (0, 0, 0))
    upright.paste((255, 255, 255), (0, 0, 4, 4))  # a white corner, top left
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose that a camera held so would have made
    raw = upright.transpose(PIL.Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif = PIL.Image.Exif()
    exif[images.ORIENTATION] = orientation
    path = write(tmp_path / "cat" / "a.png", raw, exif=exif)
    assert np.array_equal(pixels(images.opened(str(path))), pixels(upright))
    lines = said(tmp_path)[1]
    assert [("1 turned upright" in line) for line in lines] == ([True] if orientation > 1 else [])


def test_a_picture_over_pillows_limit_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    write(tmp_path / "cat" / "fits.png", picture(size=(10, 10)))
    data.read(tmp_path)
    write(tmp_path / "cat" / "large.png", picture(size=(11, 11)))
    with pytest.warns(PIL.Image.DecompressionBombWarning):
        text = refused(DataError, tmp_path)
    assert "too large" in text
    assert "large.png" in text
    assert "11 x 11 pixels" in text
    assert "at most 100 pixels" in text
    write(tmp_path / "cat" / "large.png", picture(size=(30, 30)))  # Pillow itself refuses twice its limit
    assert "too large" in refused(DataError, tmp_path)


def test_a_bomb_is_not_decoded(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(bomb)
    assert "too large" in refused(DataError, tmp_path)


def test_a_picture_opens_from_every_form(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png")
    wanted = pixels(picture())
    content = path.read_bytes()
    for form in (str(path), path, content, {"path": str(path), "bytes": None}, {"path": None, "bytes": content}):
        assert np.array_equal(pixels(images.opened(form)), wanted)
    for form in (None, 7, {"path": None, "bytes": None}, [1, 2]):
        with pytest.raises(DataError, match=r"not a picture \(row 3"):
            images.opened(form, "row 3")
    with pytest.raises(DataError, match=r"there is no such picture \(row 3.*gone\.png"):
        images.opened(str(tmp_path / "gone.png"), "row 3")


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = classes(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    text = refused(MissingPackageError, root)
    assert "holdfast[vision]" in text


# ---------------------------------------------------------------------- identity


def test_a_fingerprint_is_of_the_pictures_not_of_their_places(tmp_path: Path) -> None:
    one = identity.fingerprint(data.one(classes(tmp_path / "one")))
    assert one == identity.fingerprint(data.one(classes(tmp_path / "two")))
    assert one["columns"] == ["image", "label"]
    write(tmp_path / "two" / "cat" / "0.png", picture((200, 30, 11)))
    assert one != identity.fingerprint(data.one(tmp_path / "two"))
    rows = data.one(tmp_path / "one")
    (tmp_path / "one" / "cat" / "0.png").unlink()
    with pytest.raises(DataError, match="row 0, column 'image'"):
        identity.fingerprint(rows)
