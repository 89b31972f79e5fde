"""What an adapter changes and what tells two apart, against dense float64 references; refusals with their messages."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import adapters
from adapters import changes, heatmap, lowrank, profile, spectra
from adapters.siblings import Checkpoints

OPTIONS: dict[str, dict[str, Any]] = {"freeze": {"layers": 1}, "oft": {"oft_block_size": 8}, "lora": {"r": 3}}
CELLS = [
    ("bert", "lora"),
    ("bert", "rslora"),
    ("bert", "dora"),
    ("bert", "bitfit"),
    ("bert", "freeze"),
    ("bert", "full"),
    ("bert", "oft"),
    ("bert", "ia3"),
    ("bert", "pissa"),
    ("gpt2", "lora"),
    ("llama", "lora"),
    ("t5", "lora"),
    ("vit", "freeze"),
    ("resnet", "full"),
]


def adapter(tmp_path: Path, kind: str, strategy: str, name: str = "a", seed: int = 1, **options: Any) -> Path:
    folder: Path = tiny.adapter(tmp_path, kind, strategy, name, seed, **OPTIONS.get(strategy, {}) | options)[1]
    return folder


def dense(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The merged model's tensors and the backbone's, float64, by the model's own names."""
    loaded = adapters.load(folder)
    head = set(loaded.head)
    plain = {
        name.replace(".base_layer.", "."): tensor.detach().clone().double()
        for name, tensor in loaded.model.state_dict().items()
        if tensor.is_floating_point() and "lora_" not in name
    }
    whole = {name for name in loaded.trained if name in plain}
    merged = {n: t.detach().double() for n, t in adapters.merge(loaded).state_dict().items() if t.is_floating_point()}
    if whole - head:  # trained where they stand: the old values are in the backbone's folder
        from transformers import AutoModel

        old = AutoModel.from_pretrained(folder.parent / "base").state_dict()
        for name in merged:
            bare = next((n for n in old if name == n or name.endswith(f".{n}")), None)
            if bare is not None:
                plain[name] = old[bare].double()
    return merged, plain


@pytest.mark.parametrize(("kind", "strategy"), CELLS)
def test_numbers_are_those_of_the_dense_change(tmp_path: Path, kind: str, strategy: str) -> None:
    folder = adapter(tmp_path, kind, strategy)
    found = adapters.inspect(folder)
    merged, plain = dense(folder)
    by_name = {one.name: one for one in found.tensors}
    moved = 0
    for name, new in merged.items():
        if name in changes.read(folder).head:
            assert by_name[name].norm == pytest.approx(float(new.norm()), rel=1e-6)
            assert by_name[name].form == "new"
            assert by_name[name].relative is None
            continue
        delta = new - plain[name]
        norm = float(delta.norm())
        if name not in by_name:
            assert norm <= 1e-5 * float(plain[name].norm()), name
            continue
        one = by_name[name]
        moved += 1
        near = {"rel": 1e-4, "abs": 1e-6}
        assert one.shape == tuple(new.shape)
        assert one.norm == pytest.approx(norm, **near)
        assert one.base == pytest.approx(float(plain[name].norm()), **near)
        if norm and delta.ndim > 1:
            values = torch.linalg.svdvals(delta.flatten(1))
            shares = values / values.sum()
            assert one.spectrum is not None
            assert one.spectrum.spectral == pytest.approx(float(values[0]), **near)
            assert one.spectrum.stable == pytest.approx((norm / float(values[0])) ** 2, rel=1e-3)
            entropy = -sum(float(p) * math.log(float(p)) for p in shares if p > 1e-12)
            assert one.spectrum.effective == pytest.approx(math.exp(entropy), rel=1e-2)
        else:
            assert one.spectrum is None or not norm
    assert moved == len(found.inside)
    assert found.total.norm == pytest.approx(math.sqrt(sum((one.norm or 0) ** 2 for one in found.inside)))
    assert sum(group.tensors for group in found.blocks()) == len(found.inside)
    assert json.loads(json.dumps(found.to_json()))["total"]["tensors"] == moved
    assert found.lines()


def test_ranks_are_those_that_were_made(tmp_path: Path) -> None:
    folder = adapter(tmp_path, "bert", "lora", r=3, rank_pattern={"query": 2})
    ranks = {one.place.kind: one.spectrum.rank for one in adapters.inspect(folder).inside if one.spectrum}
    assert ranks["attention.self.query.weight"] == 2
    assert ranks["attention.self.key.weight"] == 3


def test_an_untrained_adapter_changes_nothing(tmp_path: Path) -> None:
    tiny.folder("bert", tmp_path / "base")
    adapted = adapters.adapt(str(tmp_path / "base"), "lora", labels=list(tiny.LABELS))
    found = adapters.inspect(adapters.save(adapted, tmp_path / "a"))
    assert {one.norm for one in found.inside} == {0.0}
    assert {one.spectrum.rank for one in found.inside if one.spectrum} == {0}
    assert found.total.relative == 0.0
    again = adapters.diff(tmp_path / "a", tmp_path / "a")
    assert isinstance(again, adapters.Difference)
    assert again.same
    assert again.total.cosine is None


def test_packed_weights_are_measured_beside_what_four_bits_made_of_them(tmp_path: Path) -> None:
    folder = adapter(tmp_path, "bert", "qlora")
    for one in adapters.inspect(folder).inside:
        edit = changes.read(folder).edits[one.name]
        assert isinstance(edit, changes.AddLowRank)
        assert one.norm == pytest.approx(float(edit.delta().double().norm()), rel=1e-5)
        assert one.base is not None


def test_added_tokens_count_from_zero(tmp_path: Path) -> None:
    tiny.folder("bert", tmp_path / "base")
    adapted = adapters.adapt(
        str(tmp_path / "base"), "lora", labels=list(tiny.LABELS), added_tokens=["<one>", "<two>", "<three>"]
    )
    tiny.shake(adapted)
    folder = adapters.save(adapted, tmp_path / "a")
    one = next(one for one in adapters.inspect(folder).tensors if one.form == "entries")
    table = adapted.model.get_input_embeddings().weight.detach().double()
    old = changes.originals(changes.read(folder)).old(one.name).double()
    grown = torch.zeros_like(table)
    grown[: len(old)] = old
    assert adapted.vocabulary is not None
    ids = list(adapted.vocabulary.ids)
    assert one.norm == pytest.approx(float((table - grown)[ids].norm()), rel=1e-6)


def test_large_matrices_by_other_ways_to_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = torch.randn(60, 90, generator=torch.Generator().manual_seed(0)) @ torch.diag(0.9 ** torch.arange(90.0))
    exact = spectra.spectrum_of(delta)
    assert exact is not None
    monkeypatch.setattr(spectra, "SQUARED", 1)
    for matrix in (delta, delta.T):
        squared = spectra.spectrum_of(matrix)
        assert squared is not None
        assert squared.effective == pytest.approx(exact.effective, rel=1e-6)
        assert squared.spectral == pytest.approx(exact.spectral, rel=1e-9)
        assert squared.rank == exact.rank == 60
    monkeypatch.setattr(spectra, "WIDE", 50)
    state = torch.random.get_rng_state()
    wide = spectra.spectrum_of(delta)
    assert wide is not None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (wide.effective, wide.rank) == (None, None)
    assert wide.spectral == pytest.approx(exact.spectral, rel=1e-3)


def test_a_product_is_taken_apart_without_forming_it() -> None:
    up, down = torch.randn(7, 3), torch.randn(3, 5)
    left, values, right = lowrank.turned(lowrank.Factors(down, up))
    torch.testing.assert_close(left @ torch.diag(values) @ right, (up @ down).double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("bert.encoder.layer.11.output.dense.weight", ("bert.encoder.layer", 11, "output.dense.weight")),
        ("model.layers.3.experts.7.w1.weight", ("model.layers", 3, "experts.*.w1.weight")),
        ("encoder.block.0.layer.1.wo.weight", ("encoder.block", 0, "layer.*.wo.weight")),
        ("bert.pooler.dense.bias", ("", None, "bert.pooler.dense.bias")),
        ("classifier.0.weight", ("", None, "classifier.0.weight")),
    ],
)
def test_places_are_read_off_names(name: str, place: tuple[str, int | None, str]) -> None:
    found = profile.place_of(name, {"classifier.0.weight"})
    assert (found.stack, found.block, found.kind) == place


# ---------------------------------------------------------------------- without a backbone


def test_without_the_backbone_low_rank_is_measured_and_the_rest_is_not(tmp_path: Path) -> None:
    lora = adapter(tmp_path, "bert", "lora", "a", unfrozen_parameters=["LayerNorm"])
    full = adapter(tmp_path, "bert", "freeze", "b")
    (tmp_path / "base").rename(tmp_path / "moved")
    found = adapters.inspect(lora)
    assert len(found.inside) == 18
    assert found.total.relative is None
    assert len(found.notes) == 2
    assert "is not on this machine" in found.notes[0]
    assert "14 tensors were replaced as a whole" in found.notes[1]
    beside = adapters.inspect(lora, base=tmp_path / "moved")
    assert beside.total.relative is not None
    assert {one.name: one.norm for one in found.inside}.items() <= {o.name: o.norm for o in beside.inside}.items()
    mixed = adapters.inspect(full)
    assert [one.form for one in mixed.tensors if one.norm is not None] == ["new", "new"]
    with pytest.raises(adapters.RequestError, match="there is no such backbone folder"):
        adapters.inspect(lora, base=tmp_path / "nowhere")
    two = adapters.diff(full, adapter(tmp_path / "again", "bert", "freeze", "c", seed=2))
    assert isinstance(two, adapters.Difference)
    assert "not known without the backbone" in two.notes[0]
    assert all(one.difference is not None for one in two.tensors)


def test_nothing_can_be_told_of_whole_tensors_alone(tmp_path: Path) -> None:
    tiny.folder("llama", tmp_path / "base", auto="AutoModelForCausalLM")
    adapted = adapters.adapt(str(tmp_path / "base"), "freeze", task="causal-lm", layers=1)
    folder = adapters.save(adapted, tmp_path / "a")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(adapters.RequestError, match="cannot be told without its backbone"):
        adapters.inspect(folder)


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path, "bert", "lora")
    tiny.folder("bert", tmp_path / "other", seed=7)
    with pytest.raises(adapters.BackboneError, match="not the backbone that the adapter was trained on"):
        adapters.inspect(folder, base=tmp_path / "other")


# ---------------------------------------------------------------------- two adapters

PAIRS = [
    ("lora", "lora"),
    ("lora", "rslora"),
    ("lora", "dora"),
    ("lora", "full"),
    ("full", "freeze"),
    ("bitfit", "full"),
    ("oft", "ia3"),
    ("qlora", "lora"),
]


@pytest.mark.parametrize("strategies", PAIRS, ids="-".join)
def test_two_changes_beside_their_dense_selves(tmp_path: Path, strategies: tuple[str, str]) -> None:
    folders = [adapter(tmp_path, "bert", s, name, seed) for s, name, seed in zip(strategies, "ab", (1, 2), strict=True)]
    found = adapters.diff(*folders)
    assert isinstance(found, adapters.Difference)
    assert not found.same
    sides = [changes.read(folder) for folder in folders]
    bases = [changes.originals(side) for side in sides]
    for one in found.tensors:
        deltas = []
        for side, base in zip(sides, bases, strict=True):
            edit = side.edits.get(one.name)
            if edit is None:
                deltas.append(None)
            elif one.new:
                deltas.append(edit(None).double())
            elif isinstance(edit, changes.AddLowRank):
                deltas.append(edit.up.double() @ edit.down.double() * edit.scale)
            else:
                old = base.old(one.name)
                deltas.append(edit(old).double() - old.double())
        there = [delta for delta in deltas if delta is not None]
        a, b = (delta if delta is not None else torch.zeros_like(there[0]) for delta in deltas)
        near = {"rel": 1e-4, "abs": 1e-5}
        assert one.a == pytest.approx(float(a.norm()), **near)
        assert one.b == pytest.approx(float(b.norm()), **near)
        assert one.difference == pytest.approx(float((a - b).norm()), **near)
        if one.cosine is not None:
            assert one.cosine == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), abs=1e-4)
        if one.overlap is not None:
            i, j = one.overlap.ranks
            (u_a, _, v_a), (u_b, _, v_b) = (torch.linalg.svd(d, full_matrices=False) for d in (a, b))
            inputs = float((v_a[:i] @ v_b[:j].T).square().sum()) / min(i, j)
            outputs = float((u_a[:, :i].T @ u_b[:, :j]).square().sum()) / min(i, j)
            assert one.overlap.inputs == pytest.approx(inputs, abs=1e-5)
            assert one.overlap.outputs == pytest.approx(outputs, abs=1e-5)
            assert one.overlap.chance_inputs == max(i, j) / a.shape[1]
    assert (found.total.cosine is None) == (strategies in [("bitfit", "full")] and found.total.a == 0)
    assert json.loads(json.dumps(found.to_json()))["same"] is False
    assert found.lines()


def test_twice_the_same_folder_is_the_same(tmp_path: Path) -> None:
    one, two = (adapter(tmp_path, "bert", "lora", name) for name in ("a", "b"))
    found = adapters.diff(one, two, rows=tiny.rows(6))
    assert isinstance(found, adapters.Difference)
    assert found.same
    assert found.manifest == ()
    assert all(o.difference == pytest.approx(0.0, abs=1e-7) and o.cosine == pytest.approx(1.0) for o in found.tensors)
    assert all(o.overlap.inputs == pytest.approx(1.0) for o in found.tensors if o.overlap)
    assert found.agreement is not None
    assert (found.agreement.differ, found.agreement.share) == (0, 1.0)
    assert "the same, bit for bit: every trained tensor, strategy, task and backbone" in found.lines()
    assert "the manifests say the same" in found.lines()


def test_the_same_tensors_under_other_labels_are_not_the_same(tmp_path: Path) -> None:
    one = adapter(tmp_path, "bert", "lora", "a")
    adapted = adapters.adapt(str(tmp_path / "base"), "lora", labels=["x", "y", "z"], r=3)
    tiny.shake(adapted)
    found = adapters.diff(one, adapters.save(adapted, tmp_path / "b"))
    assert isinstance(found, adapters.Difference)
    assert not found.same
    assert ("task.labels", ["a", "b", "c"], ["x", "y", "z"]) in [(e.field, e.a, e.b) for e in found.manifest]
    assert "changed by both (20 of them alike)" in "\n".join(found.lines())


def test_what_only_one_changes(tmp_path: Path) -> None:
    one = adapter(tmp_path, "bert", "lora", "a", target_modules=["query"])
    two = adapter(tmp_path, "bert", "lora", "b", target_modules=["query", "value"])
    found = adapters.diff(one, two)
    assert isinstance(found, adapters.Difference)
    alone = [o for o in found.tensors if o.changed == "b"]
    assert [o.place.kind for o in alone] == ["attention.self.value.weight"] * 3
    assert all((o.a, o.cosine, o.difference) == (0.0, None, o.b) for o in alone)


def test_different_backbones_are_said_and_only_the_manifests_compared(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", "bert", "lora")
    tiny.folder("bert", tmp_path / "two" / "base", seed=7)
    two = adapter(tmp_path / "two", "bert", "lora", r=2)
    found = adapters.diff(one, two)
    assert isinstance(found, adapters.Difference)
    assert found.apart.startswith("the backbones differ in ")
    assert found.tensors == ()
    assert {"options.r", "backbone.fingerprint"} <= {entry.field for entry in found.manifest}
    assert any(line.startswith("the changes are not compared: the backbones differ") for line in found.lines())
    with pytest.raises(adapters.RequestError, match="there is nothing to draw"):
        found.picture(tmp_path / "a.png")


def test_rows_tell_where_the_answers_differ(tmp_path: Path) -> None:
    one, two = (adapter(tmp_path, "bert", "lora", n, s) for n, s in (("a", 1), ("b", 2)))
    rows = tiny.rows(24)
    found = adapters.diff(one, two, rows=rows)
    assert isinstance(found, adapters.Difference)
    answers = [[a["label"] for a in adapters.predict(adapters.load(f), [r["text"] for r in rows])] for f in (one, two)]
    apart = [n for n, (a, b) in enumerate(zip(*answers, strict=True)) if a != b]
    assert found.agreement is not None
    assert found.agreement.differ == len(apart)
    assert [o.row for o in found.agreement.first] == apart[:5]
    assert [(o.a, o.b) for o in found.agreement.first] == [(answers[0][n], answers[1][n]) for n in apart[:5]]
    assert found.agreement.share == pytest.approx(1 - len(apart) / 24)


def test_answers_of_different_tasks_are_not_compared(tmp_path: Path) -> None:
    one = adapter(tmp_path, "bert", "lora")
    adapted = adapters.adapt(str(tmp_path / "base"), "lora", task="token-classification", labels=["O", "B-X"], r=3)
    two = adapters.save(adapted, tmp_path / "b")
    with pytest.raises(adapters.RequestError, match="the answers of different tasks cannot be compared"):
        adapters.diff(one, two, rows=tiny.rows(4))
    assert adapters.diff(one, two).to_json()["same"] is False


def test_answers_are_compared_without_their_scores() -> None:
    from adapters.dissent import bare

    assert bare({"label": "a", "score": 0.3}) == "a"
    assert bare([{"label": "a", "score": 0.9}, {"label": "b", "score": 0.1}]) == "a"
    assert bare({"labels": ["a"], "scores": {"a": 0.7}}) == ["a"]
    assert bare({"score": 1.23456}) == 1.235
    assert bare([{"entity_group": "X", "score": 0.5, "word": "w"}]) == [{"entity_group": "X", "word": "w"}]


# ---------------------------------------------------------------------- checkpoints


def test_two_checkpoints_tensor_by_tensor(tmp_path: Path) -> None:
    tiny.folder("bert", tmp_path / "a")
    net = tiny.backbone("bert")
    with torch.no_grad():
        net.encoder.layer[1].output.dense.weight.mul_(1.01)
    net.save_pretrained(tmp_path / "b")
    found = adapters.diff(tmp_path / "a", tmp_path / "b")
    assert isinstance(found, Checkpoints)
    assert [one.name for one in found.tensors] == ["encoder.layer.1.output.dense.weight"]
    assert found.tensors[0].relative == pytest.approx(0.01, rel=1e-4)
    assert not found.same
    assert found.picture(tmp_path / "c.svg").read_text().startswith("<?xml")
    again = adapters.diff(tmp_path / "a", tmp_path / "a")
    assert again.same
    assert f"the same, bit for bit: all {found.alike + 1} tensors" in again.lines()
    tiny.folder("gpt2", tmp_path / "c")
    with pytest.raises(adapters.RequestError, match="no tensor in common"):
        adapters.diff(tmp_path / "a", tmp_path / "c")
    with pytest.raises(adapters.RequestError, match="base and rows are for adapters"):
        adapters.diff(tmp_path / "a", tmp_path / "b", rows=[])


def test_an_adapter_beside_a_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path, "bert", "lora")
    with pytest.raises(adapters.RequestError, match="an adapter beside a checkpoint"):
        adapters.diff(folder, tmp_path / "base")
    with pytest.raises(adapters.FolderError, match="no such adapter folder"):
        adapters.diff(folder, tmp_path / "nowhere")


# ---------------------------------------------------------------------- pictures and commands


def test_pictures_show_blocks_and_kinds(tmp_path: Path) -> None:
    one, two = (adapter(tmp_path, "bert", "lora", n, s) for n, s in (("a", 1), ("b", 2)))
    file = adapters.inspect(one).picture(tmp_path / "one.png")
    assert file.read_bytes().startswith(b"\x89PNG")
    first = adapters.diff(one, two).picture(tmp_path / "two.svg").read_bytes()
    assert adapters.diff(one, two).picture(tmp_path / "two.svg").read_bytes() != b""
    assert first.startswith(b"<?xml")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "base", "one.png", "two.svg"]
    many = {(f"h.{block}", kind): block / 80 for block in range(80) for kind in "abc"}
    scale = heatmap.Scale("share", percent=True)
    assert heatmap.draw(
        many, [(f"t{n}", 0.1) for n in range(30)], tmp_path / "many.png", title="", scale=scale
    ).exists()


@pytest.mark.parametrize(
    ("file", "said"), [("a.jpg", "a picture of another kind"), ("nowhere/a.png", "no place for a picture")]
)
def test_pictures_that_cannot_be(tmp_path: Path, file: str, said: str) -> None:
    with pytest.raises(adapters.RequestError, match=said):
        heatmap.draw({("a", "b"): 1.0}, [], tmp_path / file, title="", scale=heatmap.Scale("x"))


def test_a_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(adapters.MissingPackageError, match="holdfast\\[report\\]"):
        heatmap.check(tmp_path / "a.png")


def test_a_disk_that_refuses_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    (tmp_path / "a.png").write_bytes(b"old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(adapters.DiskError, match="No space left"):
        heatmap.draw({("a", "b"): 1.0}, [], tmp_path / "a.png", title="", scale=heatmap.Scale("x"))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.png", b"old")]


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from adapters.cli import app

    one, two = (str(adapter(tmp_path, "bert", "lora", n, s)) for n, s in (("a", 1), ("b", 2)))

    def said(*words: str) -> str:
        app(args=list(words), standalone_mode=False)
        return capsys.readouterr().out

    assert "by kind of module" in said("inspect", one, "--changes", "--picture", str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").exists()
    assert json.loads(said("inspect", one, "--changes", "--json"))["total"]["tensors"] == 18
    (tmp_path / "rows.csv").write_text("text\n" + "\n".join(r["text"] for r in tiny.rows(8)) + "\n")
    text = said("diff", one, two, "--data", str(tmp_path / "rows.csv"), "--picture", str(tmp_path / "b.svg"))
    assert "answers   agree on" in text
    assert str(tmp_path / "b.svg") in text
    assert json.loads(said("diff", one, one, "--json"))["same"] is True
    with pytest.raises(adapters.RequestError, match="--base and --picture are for --changes"):
        said("inspect", one, "--picture", str(tmp_path / "a.png"))
