"""Image classification: what pictures become, how they vary, what is learnt from and what is answered."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as Feature
from PIL import Image
from warm_host import Warm

import adapters
from adapters import cli, data, division, fidelity, formats, identity, pixels
from adapters.contracts import Draw
from adapters.errors import DataError, MissingPackageError, RequestError
from adapters.exactness import BOUNDS
from adapters.tasks.image_classification import ImageClassification

LABELS = ("blue", "green", "red")
SIDE = 16
PATCHES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": SIDE,
    "patch_size": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "vit": PATCHES,
    "deit": PATCHES,
    "dinov2": PATCHES,
    "swin": {
        "image_size": SIDE,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    },
    "resnet": {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "basic"},
}


def config(kind: str, **changes: Any) -> Any:
    made = transformers.CONFIG_MAPPING[kind](**FAMILIES[kind] | changes)
    made.architectures = made.architectures or []
    return made


def model(kind: str = "vit", labels: int = 3, seed: int = 0, **changes: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForImageClassification.from_config(config(kind, num_labels=labels, **changes))


def processor(size: int = SIDE, **changes: Any) -> Any:
    return transformers.ViTImageProcessorPil(size={"height": size, "width": size}, **changes)


def backbone(kind: str, place: Path, **changes: Any) -> str:
    """A headless backbone and its image processor, saved where `adapt` can load them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config(kind, **changes)).save_pretrained(place)
    processor().save_pretrained(place)
    return str(place)


def picture(label: str, seed: int = 0, size: tuple[int, int] = (20, 12)) -> Image.Image:
    """Noise in which the label's colour is the strongest."""
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 120, (size[1], size[0], 3))
    values[..., ("red", "green", "blue").index(label)] += 110
    return Image.fromarray(values.astype("uint8"))


def folder(place: Path, count: int = 16) -> Path:
    """Class folders with so many pictures each."""
    for number, label in enumerate(LABELS):
        (place / label).mkdir(parents=True)
        for index in range(count):
            picture(label, 1000 * number + index).save(place / label / f"{index:03d}.png")
    return place


def rows(count: int = 12) -> list[dict[str, Any]]:
    return [{"image": picture(LABELS[n % 3], n), "label": LABELS[n % 3]} for n in range(count)]


def rows_of(found: list[dict[str, Any]]) -> Dataset:
    return data.read(found)["train"]


def adapted_of(kind: str = "vit", strategy: str = "probe", **options: Any) -> Any:
    given = {"labels": LABELS, "task": "image-classification", **options}
    return adapters.adapt(model(kind, labels=len(given["labels"])), strategy, processor=processor(), **given)


def as_bytes(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


# ---------------------------------------------------------------------- rows


def test_paths_bytes_pictures_and_features_become_the_same_pixels(tmp_path: Path) -> None:
    images = [picture(label, n) for n, label in enumerate(LABELS)]
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    feature = Features({"image": Feature(), "label": Value("string")})
    forms: dict[str, Any] = {
        "pictures": [{"image": image, "label": "red"} for image in images],
        "opened files": [{"image": Image.open(path), "label": "red"} for path in paths],
        "paths": [{"image": path, "label": "red"} for path in paths],
        "texts": [{"image": str(path), "label": "red"} for path in paths],
        "bytes": [{"image": path.read_bytes(), "label": "red"} for path in paths],
        "feature": Dataset.from_dict({"image": [str(p) for p in paths], "label": ["red"] * 3}, features=feature),
    }
    net, wanted = model(), processor()(images=images, return_tensors="pt")["pixel_values"]
    task = ImageClassification(LABELS)
    for name, form in forms.items():
        found, remarks = task.prepare(data.one(form), processor(), net, labelled=True)
        assert remarks == []
        batch = task.collate([found[n] for n in range(3)], net, processor())
        assert torch.equal(batch["pixel_values"], wanted), name
        assert batch["labels"].tolist() == [2, 2, 2]
        assert (batch["row"], list(found["length"])) == ([0, 1, 2], [1, 1, 1])


def test_prepared_rows_hold_references_not_pixels(tmp_path: Path) -> None:
    picture("red").save(tmp_path / "one.png")
    task = ImageClassification(LABELS)
    kept, _ = task.prepare(data.one([{"image": tmp_path / "one.png"}]), processor(), model(), labelled=False)
    assert kept[0]["image"] == {"bytes": None, "path": str(tmp_path / "one.png")}
    assert "labels" not in kept.column_names


def test_class_numbers_and_several_labels_and_numbers_are_read() -> None:
    image = as_bytes(picture("red"))
    feature = Features({"image": Value("binary"), "label": ClassLabel(names=["blue", "green", "red"])})
    numbered = Dataset.from_dict({"image": [image] * 2, "label": [2, 0]}, features=feature)
    task = ImageClassification().with_rows(numbered)
    assert task.labels == LABELS
    assert list(task.prepare(numbered, processor(), model(), labelled=True)[0]["labels"]) == [2, 0]

    several = rows_of([{"image": image, "label": ["red", "blue"]}, {"image": image, "label": []}])
    many = ImageClassification(LABELS, problem="multi-label")
    assert many.prepare(several, processor(), model(), labelled=True)[0]["labels"][:] == [[1, 0, 1], [0, 0, 0]]

    value = rows_of([{"image": image, "label": 1.5}])
    number = ImageClassification(problem="regression")
    assert number.prepare(value, processor(), model(labels=1), labelled=True)[0]["labels"][:] == [1.5]


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        ("missing.png", "missing.png"),
        (__file__, "cannot be read"),
        (b"no picture", "cannot be read"),
        (as_bytes(picture("red"))[:-40], "cannot be read"),
        (None, "not a picture"),
    ],
    ids=["missing", "no picture", "no bytes of one", "cut off", "none"],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_a_picture_that_cannot_be_read_is_refused_up_front(
    cell: Any, found: str, labelled: bool, tmp_path: Path
) -> None:
    picture("red").save(tmp_path / "good.png")
    good = str(tmp_path / "good.png") if isinstance(cell, str) else (tmp_path / "good.png").read_bytes()
    bad = Dataset.from_dict({"image": [good, cell], "label": ["red", "red"]})
    task = ImageClassification(LABELS)
    for act in (
        lambda: task.check(bad, labelled=labelled),
        lambda: task.prepare(bad, processor(), model(), labelled=labelled),
    ):
        with pytest.raises(DataError, match=found) as fault:
            act()
        assert "row 1" in str(fault.value)


@pytest.mark.parametrize(
    ("column", "value", "pattern"),
    [
        ("image", 5, "holds no pictures.*column 'image'"),
        ("label", "pink", "unknown label 'pink'.*row 0, column 'label'"),
        ("label", "", "label is missing.*row 0"),
    ],
)
def test_wrong_cells_are_refused(column: str, value: Any, pattern: str) -> None:
    row = {"image": as_bytes(picture("red")), "label": "red"} | {column: value}
    with pytest.raises(DataError, match=pattern):
        ImageClassification(LABELS).check(Dataset.from_list([row]), labelled=True)
    with pytest.raises(DataError, match=f"no column {column!r}"):
        ImageClassification(LABELS).check(Dataset.from_list([row]).remove_columns(column), labelled=True)


def test_other_modes_become_the_models_channels_and_are_said() -> None:
    images = [picture("red").convert(mode) for mode in ("RGB", "L", "RGBA", "L")]
    task = ImageClassification(LABELS)
    found, remarks = task.prepare(rows_of([{"image": image} for image in images]), processor(), model(), labelled=False)
    assert len(remarks) == 1
    assert "2 L" in remarks[0]
    assert "1 RGBA" in remarks[0]
    assert task.collate([found[n] for n in range(4)], model(), processor())["pixel_values"].shape == (4, 3, SIDE, SIDE)

    grey = processor(image_mean=[0.5], image_std=[0.5])
    net = model(num_channels=1)
    found, _ = task.prepare(rows_of([{"image": image} for image in images]), grey, net, labelled=False)
    batch = task.collate([found[n] for n in range(4)], net, grey)["pixel_values"]
    assert batch.shape == (4, 1, SIDE, SIDE)
    assert torch.equal(batch[1], grey(images=images[1], return_tensors="pt")["pixel_values"][0])


def test_pixels_that_the_model_does_not_take_are_refused_with_its_reason() -> None:
    found = rows_of(rows(2))
    task = ImageClassification(LABELS)
    with pytest.raises(RequestError, match=r"3x224x224.*doesn't match model.*preprocessor_config.json"):
        task.prepare(found, processor(224), model(), labelled=True)
    with pytest.raises(RequestError, match=r"cannot take the pictures.*mean must have 1 elements"):
        task.prepare(found, processor(), model(num_channels=1), labelled=True)
    with pytest.raises(RequestError, match="5 channels"):
        task.prepare(found, processor(), model(num_channels=5), labelled=True)
    with pytest.raises(RequestError, match=r"image processor.*AutoImageProcessor"):
        task.prepare(found, None, model(), labelled=True)
    task.prepare(found, processor(224), model("resnet"), labelled=True)  # a ConvNet takes any size


def test_trying_the_model_leaves_it_as_it_was() -> None:
    net = model("resnet")
    net.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    ImageClassification(LABELS).prepare(rows_of(rows(3)), processor(), net, labelled=True)
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_several_sizes_need_a_processor_that_makes_them_one() -> None:
    keeps = processor(do_resize=False)
    found = rows_of([{"image": picture("red", size=size)} for size in ((16, 16), (16, 16), (20, 16))])
    task = ImageClassification(LABELS)
    with pytest.raises(DataError, match=r"row 2.*expected 16 x 16 pixels.*found 20 x 16.*do_resize"):
        task.prepare(found, keeps, model(), labelled=False)
    assert len(task.prepare(found.select([0, 1]), keeps, model(), labelled=False)[0]) == 2


def test_pixels_made_elsewhere_are_taken_as_they_are() -> None:
    values = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).tolist()
    found = Dataset.from_dict({"pixel_values": values, "labels": [0, 1, 2, 0], "note": ["x"] * 4})
    task = ImageClassification(LABELS, augment="flip")
    kept, remarks = task.prepare(found, None, model(), labelled=True)
    assert remarks == ["the rows hold pixels already: augment changes nothing"]
    assert set(kept.column_names) == {"pixel_values", "labels", "length", "row"}
    batch = task.collate([kept[n] for n in range(4)], model(), None, Draw())
    assert torch.equal(batch["pixel_values"], torch.tensor(values))
    with pytest.raises(RequestError, match="does not take these pixels"):
        task.prepare(found, None, model(image_size=32), labelled=True)
    with pytest.raises(DataError, match=r"row 1, column 'labels'"):
        task.prepare(found.remove_columns("labels").add_column("labels", [0, 3, 1, 1]), None, model(), labelled=True)
    ragged = Dataset.from_dict({"pixel_values": [values[0], torch.zeros(3, 8, 8).tolist()]})
    with pytest.raises(DataError, match=r"row 1, column 'pixel_values'.*\(3, 8, 8\)"):
        task.prepare(ragged, None, model(), labelled=False)
    nan = Dataset.from_dict({"pixel_values": [values[0], torch.full((3, SIDE, SIDE), float("nan")).tolist()]})
    with pytest.raises(DataError, match="row 1"):
        task.prepare(nan, None, model(), labelled=False)


@pytest.mark.parametrize("form", ["folder", "paths"])
def test_a_split_keeps_equal_pictures_apart_and_classes_in_proportion(form: str, tmp_path: Path) -> None:
    folder(tmp_path, 20)
    for label in LABELS:  # the first picture of each class four times more, under other names
        for copy in range(4):
            (tmp_path / label / f"copy{copy}.png").write_bytes((tmp_path / label / "000.png").read_bytes())
    listed = [{"image": str(path), "label": path.parent.name} for path in sorted(tmp_path.rglob("*.png"))]
    source: Any = str(tmp_path) if form == "folder" else listed
    found, _ = formats.arrange(data.one(source), None, ImageClassification.columns)
    assert len(set(identity.identities(found, "image"))) == 60
    for seed in range(5):
        parts, _ = division.split(found, {"validation": 0.2, "test": 0.2}, seed=seed, by="label", text="image")
        owners: dict[str, set[str]] = {}
        for name, part in parts.items():
            for key in identity.identities(part, "image"):
                owners.setdefault(key, set()).add(name)
            assert set(part["label"]) == set(LABELS)
        assert all(len(names) == 1 for names in owners.values())
        assert sum(len(part) for part in parts.values()) == 72


def test_the_data_fingerprint_is_of_the_pictures_not_of_their_place(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for place in (one, other):
        folder(place, 2)
    known = ImageClassification.columns

    def print_of(source: Any) -> str:
        return str(identity.fingerprint(data.rename(data.one(source), None, known))["sha256"])

    assert print_of(str(one)) == print_of(str(other))
    listed = [{"image": str(path), "label": path.parent.name} for path in sorted(other.rglob("*.png"))]
    assert print_of(listed) == print_of(str(one))
    picture("red", 99).save(other / "red" / "001.png")
    assert print_of(str(one)) != print_of(str(other))


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = backbone("vit", tmp_path / "vit")

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("AutoImageProcessor requires the PIL library")

    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", missing)
    with pytest.raises(MissingPackageError, match=r"holdfast\[vision\]"):
        adapters.adapt(place, "probe", task="image-classification", labels=LABELS)


# ---------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("size", [(32, 32), (28, 40), (120, 90)])
@pytest.mark.parametrize("how", list(pixels.AUGMENTS))
def test_a_varied_picture_keeps_size_and_mode_and_follows_its_seed(how: str, size: tuple[int, int]) -> None:
    original = picture("red", 3, size)
    for image in (original, original.convert("L")):
        seen = set()
        for seed in range(12):
            found = pixels.augmented(image, how, np.random.default_rng(seed))
            assert (found.size, found.mode) == (image.size, image.mode)
            assert found.tobytes() == pixels.augmented(image, how, np.random.default_rng(seed)).tobytes()
            seen.add(found.tobytes())
        if how == "none":
            assert seen == {image.tobytes()}
        elif how == "flip":
            assert seen == {image.tobytes(), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()}
        else:
            assert len(seen) > 8


def test_small_pictures_move_by_an_eighth_at_most_and_large_ones_lose_three_quarters_at_most() -> None:
    marked = np.zeros((32, 32), np.uint8)
    marked[16, 16] = 255
    places = set()
    for seed in range(300):
        moved = np.asarray(pixels.augmented(Image.fromarray(marked), "crop", np.random.default_rng(seed)))
        (down, across), *others = np.argwhere(moved == 255).tolist()
        assert not others
        places.add((down - 16, across - 16))
    assert {down for down, _ in places} == {across for _, across in places} == set(range(-4, 5))

    slope = np.tile(np.linspace(0, 255, 200), (200, 1)).astype(np.uint8)
    spans = []
    for seed in range(100):
        part = np.asarray(pixels.augmented(Image.fromarray(slope), "crop", np.random.default_rng(seed))).astype(float)
        spans.append((part.max() - part.min()) / 255)
    assert min(spans) > 0.4  # half of each side, less the widest ratio
    assert max(spans) < 1
    assert np.std(spans) > 0.05


def test_a_training_row_varies_by_seed_epoch_and_row_alone_and_an_evaluated_one_never() -> None:
    task = ImageClassification(LABELS, augment="standard")
    net, kept = model(), None
    kept, _ = task.prepare(rows_of(rows(6)), processor(), net, labelled=True)

    def made(picks: list[int], draw: Draw | None) -> Any:
        batch = task.collate([kept[n] for n in picks], net, processor(), draw)
        return dict(zip(picks, batch["pixel_values"], strict=True))

    plain = made(list(range(6)), None)
    first, again, alone = made(list(range(6)), Draw(1, 0)), made([5, 3, 4, 0, 2, 1], Draw(1, 0)), made([4], Draw(1, 0))
    later, other = made(list(range(6)), Draw(1, 1)), made(list(range(6)), Draw(2, 0))
    assert all(torch.equal(first[n], again[n]) for n in range(6))
    assert torch.equal(first[4], alone[4])
    for different in (plain, later, other):
        assert sum(torch.equal(first[n], different[n]) for n in range(6)) < 3
    still = ImageClassification(LABELS)
    batch = still.collate([kept[n] for n in range(6)], net, processor(), Draw(1, 0))
    assert all(torch.equal(batch["pixel_values"][n], plain[n]) for n in range(6))


def test_the_trainer_varies_what_it_trains_on_and_nothing_else(tmp_path: Path) -> None:
    adapted = adapted_of(augment="standard")
    trainer = adapters.Trainer(adapted, {"output_dir": str(tmp_path)}, rows(6), rows(6))

    def pixels_of(loader: Any) -> dict[int, Any]:
        found = {}
        for batch in loader:
            found |= dict(zip(batch["row"], batch["pixel_values"], strict=True))
        return found

    plain = pixels_of(trainer.get_eval_dataloader())
    trained = pixels_of(trainer.get_train_dataloader())
    assert plain.keys() == trained.keys() == set(range(6))
    assert sum(torch.equal(plain[n], trained[n]) for n in range(6)) < 3
    evaluated = pixels_of(trainer.get_eval_dataloader())
    assert all(torch.equal(plain[n], evaluated[n]) for n in range(6))


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"augment": "flips"}, "unknown augment 'flips'.*Did you mean 'flip'"),
        ({"augment": None}, "augment"),
        ({"problem": "detection"}, "unknown problem"),
        ({"labels": "red"}, "one text instead of names"),
        ({"problem": "regression"}, "no label names"),
        ({"interpolate_pos_encoding": "yes"}, "interpolate_pos_encoding"),
        ({"max_length": 5}, "unknown option 'max_length'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], pattern: str) -> None:
    with pytest.raises(RequestError, match=pattern):
        adapted_of(**options)


def test_pictures_of_another_size_with_interpolated_positions(tmp_path: Path) -> None:
    large = processor(24)
    net = model()
    with pytest.raises(RequestError, match="Leave the option out"):
        adapted_of("resnet", interpolate_pos_encoding=True)
    adapted = adapters.adapt(net, "probe", labels=LABELS, processor=large, interpolate_pos_encoding=True)
    trainer = adapters.Trainer(adapted, {"output_dir": str(tmp_path / "run"), "max_steps": 2}, rows(6), rows(6))
    trainer.train()
    numbers = adapters.evaluate(adapted, rows(6))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(numbers["loss"], abs=1e-5)
    values = large(images=[row["image"] for row in rows(6)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = net.eval()(pixel_values=values, interpolate_pos_encoding=True).logits
    best = [LABELS[index] for index in logits.argmax(-1)]
    assert [answer[0]["label"] for answer in adapters.predict(adapted, [row["image"] for row in rows(6)])] == best


# ---------------------------------------------------------------------- losses


@pytest.mark.parametrize("problem", ["single-label", "multi-label", "regression"])
def test_any_split_into_micro_batches_gives_the_same_gradient(problem: str) -> None:
    labels = () if problem == "regression" else LABELS
    task = ImageClassification(labels, problem=problem)
    net = model(labels=len(labels) or 1)
    cells: Any = {"single-label": "red", "multi-label": ["red", "blue"], "regression": 0.5}[problem]
    found = [{"image": picture(LABELS[n % 3], n), "label": cells} for n in range(7)]
    kept, _ = task.prepare(rows_of(found), processor(), net, labelled=True)

    def gradient(sizes: list[int]) -> Any:
        net.zero_grad()
        batches, start = [], 0
        for size in sizes:
            batches.append(task.collate([kept[start + n] for n in range(size)], net, processor()))
            start += size
        items = sum(task.items(batch["labels"]) for batch in batches)
        total = 0.0
        for batch in batches:
            loss = task.loss(net(pixel_values=batch["pixel_values"]), batch["labels"], items)
            loss.backward()
            total += float(loss.detach())
        return total, net.classifier.weight.grad.clone()

    whole, parts = gradient([7]), gradient([1, 4, 2])
    assert whole[0] == pytest.approx(parts[0], rel=1e-5)
    assert torch.allclose(whole[1], parts[1], atol=1e-6)


def test_gradient_accumulation_changes_nothing(tmp_path: Path) -> None:
    heads = []
    for batch, steps in ((6, 1), (2, 3)):
        adapted = adapted_of()
        args = {
            "output_dir": str(tmp_path / str(batch)),
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": steps,
            "num_train_epochs": 2,
            "warmup_steps": 0,
            "max_grad_norm": 0.0,
            "optim": "sgd",
        }
        adapters.Trainer(adapted, args, rows(12)).train()
        heads.append(torch.cat([tensor.flatten() for tensor in adapted.state().values()]).clone())
    assert not torch.equal(heads[0], torch.cat([t.flatten() for t in adapted_of().state().values()]))
    assert torch.allclose(heads[0], heads[1], atol=1e-5)


# ---------------------------------------------------------------------- answers


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_answers_are_those_of_the_pipeline_key_for_key(kind: str, tmp_path: Path) -> None:
    names = ("a", "b", "c", "d", "e", "f", "g")  # more than the five of an answer
    adapted = adapted_of(kind, labels=names)
    tiny.shake(adapted, 1.0)
    images = [picture(LABELS[n % 3], n, (20 + n, 12)) for n in range(5)]
    paths = []
    for number, image in enumerate(images):
        paths.append(str(tmp_path / f"{number}.png"))
        image.save(paths[-1])
    pipe = transformers.pipeline("image-classification", model=adapted.model, image_processor=adapted.processor)
    same(adapters.predict(adapted, images, batch_size=2), pipe(images))
    same(adapters.predict(adapted, paths), pipe(paths))
    assert len(adapters.predict(adapted, paths)[0]) == 5


@pytest.mark.parametrize("problem", ["multi-label", "regression"])
def test_answers_of_other_problems_are_those_of_the_pipeline(problem: str) -> None:
    net = model(labels=3 if problem == "multi-label" else 1)
    labels = LABELS if problem == "multi-label" else None
    options = {"labels": labels} if labels else {}
    adapted = adapters.adapt(
        net, "probe", processor=processor(), problem=problem, task="image-classification", **options
    )
    tiny.shake(adapted, 1.0)
    images = [picture(LABELS[n % 3], n) for n in range(4)]
    pipe = transformers.pipeline("image-classification", model=adapted.model, image_processor=adapted.processor)
    same(adapters.predict(adapted, images), pipe(images))


def same(found: list[Any], wanted: list[Any]) -> None:
    assert [[list(entry) for entry in answer] for answer in found] == [[["label", "score"]] * len(a) for a in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert [entry["label"] for entry in one] == [entry["label"] for entry in other]
        assert [entry["score"] for entry in one] == pytest.approx([entry["score"] for entry in other], abs=1e-5)


def test_baselines_and_metrics_agree_with_the_trainers(tmp_path: Path) -> None:
    adapted = adapted_of()
    tiny.shake(adapted, 0.5)
    test = rows(11)
    trainer = adapters.Trainer(adapted, {"output_dir": str(tmp_path)}, rows(12), test)
    numbers = adapters.evaluate(adapted, test, batch_size=4)
    found = trainer.evaluate()
    for name in ("loss", "accuracy", "macro_f1"):
        assert found[f"eval_{name}"] == pytest.approx(numbers[name], abs=1e-6)
    answers = [answer[0]["label"] for answer in adapters.predict(adapted, [row["image"] for row in test])]
    right = sum(answer == row["label"] for answer, row in zip(answers, test, strict=True))
    assert numbers["accuracy"] == pytest.approx(right / 11)
    truth = trainer.prepared(test)
    majority = adapted.task.baseline(truth, truth, adapted.processor)
    assert majority["accuracy"] == max(Counter(row["label"] for row in test).values()) / 11


# ---------------------------------------------------------------------- every strategy, every family


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("pictures"), 15)


CELLS = [
    *[("vit", strategy) for strategy in ("full", "freeze", "probe", "bitfit", "lora", "qlora")],
    *[(kind, "lora") for kind in ("deit", "dinov2", "swin")],
    ("swin", "freeze"),
    ("resnet", "probe"),
]


def merged(place: Path, base: str, paths: list[str] | None = None) -> dict[str, Any]:
    """The adapter `out` merged into `merged`, and the logits check done in this process, which has torch already."""
    adapters.merge_on_disk(place / "out", place / "merged", check_logits=False)
    found = fidelity.compare(str(place / "out"), str(place / "merged"), base, paths)
    assert found["max_difference"] <= BOUNDS["float32"] * found["spread"]
    return found


@pytest.mark.parametrize(("kind", "strategy"), CELLS)
def test_trained_saved_loaded_and_merged(kind: str, strategy: str, tmp_path: Path, pictures: Path) -> None:
    base = backbone(kind, tmp_path / "base")
    recipe = adapters.Recipe(
        model=base,
        data=str(pictures),
        task="image-classification",
        strategy=strategy,
        output=str(tmp_path / "out"),
        options={"augment": "flip"},
        train={"max_steps": 6, "eval_strategy": "no", "learning_rate": 3e-3},
        validation=0.2,
        test=0.2,
    )
    results = recipe.run(lambda line: None)
    assert results["rows"] == {"train": 27, "validation": 9, "test": 9}
    assert results["majority"]["accuracy"] == pytest.approx(1 / 3)
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()

    paths = sorted(str(path) for path in pictures.rglob("00*.png"))[:9]
    loaded = adapters.load(tmp_path / "out")
    assert loaded.task.augment == "flip"
    answers = adapters.predict(loaded, paths)
    assert merged(tmp_path, base, paths)["agreement"] == 1
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()
    pipe = transformers.pipeline("image-classification", model=str(tmp_path / "merged"))
    loose = 2e-2 if strategy == "qlora" else 1e-4
    for one, other in zip(answers, pipe(paths), strict=True):
        found = {entry["label"]: entry["score"] for entry in other}
        assert {entry["label"]: entry["score"] for entry in one} == pytest.approx(found, abs=loose)


@pytest.mark.parametrize(
    ("kind", "strategy", "options", "pattern"),
    [
        ("resnet", "lora", {}, "ResNet"),
        ("vit", "freeze", {"layers": 4}, "expected 1 to 3"),
        ("vit", "lora", {"target_modules": ["c_attn"]}, "match nothing"),
    ],
)
def test_what_cannot_be_is_refused(kind: str, strategy: str, options: dict[str, Any], pattern: str) -> None:
    net = model(kind)
    before = [(name, type(module)) for name, module in net.named_modules()]
    with pytest.raises(RequestError, match=pattern):
        adapters.adapt(net, strategy, labels=LABELS, processor=processor(), **options)
    assert [(name, type(module)) for name, module in net.named_modules()] == before


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_a_live_model_names_its_task_and_its_head_is_what_lies_outside(kind: str) -> None:
    net = model(kind)
    adapted = adapters.adapt(net, "probe", processor=processor(), labels=LABELS)
    assert adapted.model is net
    assert isinstance(adapted.task, ImageClassification)
    assert adapted.head == {name for name, _ in net.named_parameters() if name.startswith("classifier.")}
    assert set(adapted.trained) == adapted.head


def test_a_distilled_model_with_two_heads_is_taken() -> None:
    net = transformers.DeiTForImageClassificationWithTeacher(config("deit", num_labels=3))
    adapted = adapters.adapt(net, "probe", processor=processor(), labels=LABELS)
    assert adapted.head == {
        f"{kind}_classifier.{leaf}" for kind in ("cls", "distillation") for leaf in ("weight", "bias")
    }


def test_a_backbone_with_a_pooler_is_adapted_without_it(tmp_path: Path) -> None:
    base = backbone("vit", tmp_path / "base")
    saved = transformers.AutoModel.from_pretrained(base)
    assert any("pooler" in name for name, _ in saved.named_parameters())
    adapted = adapters.adapt(base, "probe", task="image-classification", labels=LABELS)
    assert not any("pooler" in name for name, _ in adapted.model.named_parameters())
    adapters.save(adapted, tmp_path / "out")
    assert merged(tmp_path, base)["agreement"] == 1
    auto = transformers.AutoModelForImageClassification
    found, info = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert found.config.id2label == {0: "blue", 1: "green", 2: "red"}


def test_a_new_process_answers_the_same(warm: Warm, tmp_path: Path) -> None:
    base = backbone("vit", tmp_path / "base")
    adapted = adapters.adapt(base, "lora", task="image-classification", labels=LABELS)
    tiny.shake(adapted, 0.5)
    picture("green", 7).save(tmp_path / "one.png")
    wanted = adapters.predict(adapted, [tmp_path / "one.png"])
    adapters.save(adapted, tmp_path / "out")
    code, out, err = warm.command("predict", tmp_path / "out", tmp_path / "one.png", "--json")
    assert code == 0, err
    assert json.loads(out)["predictions"] == wanted


def test_the_logits_check_needs_no_pictures_and_takes_no_live_ones(tmp_path: Path) -> None:
    base = backbone("dinov2", tmp_path / "base", image_size=28)  # trained on other sizes than the processor gives
    adapted = adapters.adapt(base, "lora", task="image-classification", labels=LABELS)
    tiny.shake(adapted)
    adapters.save(adapted, tmp_path / "out")
    with pytest.raises(RequestError, match=r"rows of the logits check.*by their files"):
        adapters.merge_on_disk(tmp_path / "out", tmp_path / "merged", rows=[picture("red")])
    assert not (tmp_path / "merged").exists()
    assert merged(tmp_path, base)["agreement"] == 1
    other = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        other.classifier.weight *= 1.5
    other.save_pretrained(tmp_path / "other")
    assert fidelity.compare(str(tmp_path / "out"), str(tmp_path / "other"), base, None)["max_difference"] > 1e-2


def test_a_grey_model_goes_all_the_way(tmp_path: Path) -> None:
    base = backbone("vit", tmp_path / "base", num_channels=1)
    processor(image_mean=[0.5], image_std=[0.5]).save_pretrained(base)
    adapted = adapters.adapt(base, "lora", task="image-classification", labels=LABELS)
    adapters.Trainer(adapted, {"output_dir": str(tmp_path / "run"), "max_steps": 2}, rows(6)).train()
    adapters.save(adapted, tmp_path / "out")
    assert merged(tmp_path, base)["agreement"] == 1


def test_colours_are_learnt(tmp_path: Path, pictures: Path) -> None:
    adapted = adapters.adapt(
        backbone("vit", tmp_path / "base"), "full", task="image-classification", labels=LABELS, augment="standard"
    )
    found = data.one(str(pictures))
    parts, _ = division.split(found, {"test": 0.25}, seed=0, by="label")
    args = {"output_dir": str(tmp_path / "run"), "num_train_epochs": 8, "learning_rate": 3e-3}
    adapters.Trainer(adapted, args, parts["train"]).train()
    assert adapters.evaluate(adapted, parts["test"])["accuracy"] > 0.9


# ---------------------------------------------------------------------- the command line


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    cli.app(args=list(arguments), prog_name="adapters", standalone_mode=False)
    return capsys.readouterr().out


def test_the_command_line_trains_evaluates_answers_and_merges(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = backbone("vit", tmp_path / "base"), str(tmp_path / "out")
    said = run(
        capsys,
        *["train", "--task", "image-classification", "--model", base, "--data", str(pictures), "--output", out],
        *["--strategy", "probe", "--set", "train.num_train_epochs=2", "--set", "options.augment=standard"],
    )
    assert f"adapters predict {out} --data {pictures}" in said
    numbers = json.loads(run(capsys, "evaluate", out, "--data", str(pictures), "--json"))
    assert numbers["rows"] == 45
    one = str(pictures / "red" / "000.png")
    wanted = adapters.predict(adapters.load(out), [one])[0]
    assert run(capsys, "predict", out, one) == f"{wanted[0]['label']}\t{wanted[0]['score']:.4f}\t{one}\n"
    assert json.loads(run(capsys, "predict", out, one, "--json"))["predictions"] == [wanted]
    lines = run(capsys, "predict", out, "--data", str(pictures)).splitlines()
    assert len(lines) == 45
    assert all(Path(line.split("\t")[2]).is_file() for line in lines)
    assert "answers   agree on 100 %" in run(capsys, "merge", out, str(tmp_path / "merged"))
    with pytest.raises(DataError, match=r"row 0: .*nowhere\.png"):
        run(capsys, "predict", out, str(tmp_path / "nowhere.png"))


def test_a_broken_file_in_a_folder_is_named_before_a_model_is_loaded(tmp_path: Path, pictures: Path) -> None:
    place = tmp_path / "pictures"
    folder(place, 4)
    (place / "green" / "002.png").write_bytes(b"not a picture")
    recipe = adapters.Recipe(
        model=str(tmp_path / "no model"), data=str(place), task="image-classification", output=str(tmp_path / "out")
    )
    with pytest.raises(DataError, match=r"green/002\.png"):
        recipe.run(lambda line: None)
    assert not (tmp_path / "out").exists()


def test_the_answer_line_of_the_card_names_the_column(tmp_path: Path) -> None:
    adapters.save(adapted_of(), tmp_path / "out")
    assert 'adapters.predict(adapted, [{"image": ...}])' in (tmp_path / "out" / "README.md").read_text()


def test_options_of_the_image_processor_go_over_the_backbones_own(tmp_path: Path, pictures: Path) -> None:
    recipe = adapters.Recipe(
        model=backbone("resnet", tmp_path / "base"),
        data=str(pictures),
        task="image-classification",
        strategy="probe",
        processor={"size": {"height": 48, "width": 24}, "image_mean": [0.1, 0.2, 0.3]},
        train={"num_train_epochs": 1},
        output=str(tmp_path / "out"),
    )
    recipe.run(lambda line: None)
    loaded = adapters.load(tmp_path / "out")
    prepared = loaded.task.prepare(rows_of(rows(3)), loaded.processor, loaded.model, labelled=True)[0]
    batch = loaded.task.collate([prepared[0]], loaded.model, loaded.processor)
    assert batch["pixel_values"].shape == (1, 3, 48, 24)
    assert list(loaded.processor.image_mean) == [0.1, 0.2, 0.3]
    assert list(loaded.processor.image_std) == list(processor().image_std)
    adapters.merge_on_disk(tmp_path / "out", tmp_path / "merged")
    merged = transformers.AutoImageProcessor.from_pretrained(tmp_path / "merged", backend="pil")
    assert (merged.size["height"], merged.size["width"]) == (48, 24)
    assert "size" in (tmp_path / "out" / "run.yaml").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sise": 32}, r"the image processor has no 'sise' \(processor\)\. Did you mean 'size'"),
        ({"size": "large"}, r"does not open with these options \(processor={'size': 'large'}\); found .*large"),
    ],
)
def test_options_that_the_image_processor_does_not_have_are_refused(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    base = backbone("vit", tmp_path)
    with pytest.raises(RequestError, match=said):
        adapters.adapt(base, "probe", task="image-classification", labels=LABELS, processor=options)
    live = transformers.AutoModelForImageClassification.from_pretrained(base, num_labels=3)
    with pytest.raises(RequestError, match=said):
        adapters.adapt(live, "probe", labels=LABELS, processor=options)
    assert adapters.adapt(live, "probe", labels=LABELS, processor={"size": 32}).processor.size["height"] == 32


def test_a_tokenizer_takes_no_options(tmp_path: Path) -> None:
    tiny.backbone("bert").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RequestError, match=r"only an image processor takes options here .*found size"):
        adapters.adapt(tmp_path, "probe", labels=LABELS, processor={"size": 32})
