"""Files from strangers: refused by name, nothing executed, nothing read outside, nothing looked up."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import hostile
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adapters
from adapters import chats, jsontext, manifest, places, rendering, shards
from adapters.errors import AdaptersError, DataError, FolderError, RequestError

LABELS = hostile.LABELS
EXAMPLES = settings(deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return hostile.whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["adapter"], tmp_path / "adapter"))


class Watch:
    """What is opened by Python, through links too, while it is on."""

    on = False
    opened: list[str] = []  # noqa: RUF012

    @classmethod
    def hook(cls, event: str, args: tuple[Any, ...]) -> None:
        if cls.on and event == "open" and isinstance(args[0], str | os.PathLike):
            cls.opened.append(os.path.realpath(args[0]))


sys.addaudithook(Watch.hook)

# ---------------------------------------------------------------------- the corpus


KINDS = ("adapter", "alone", "merge", "peft", "backbone", "base")


@pytest.mark.parametrize("kind", KINDS)
def test_every_hostile_folder_is_refused_and_nothing_of_it_runs(
    kind: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def look(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"looked up {args}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", look)
    monkeypatch.setattr("builtins.input", look)
    cases = [case for case in hostile.corpus(folders) if case.kind == kind]
    wrong = []
    for number, case in enumerate(cases):
        place = tmp_path / str(number)
        opened = hostile.built(case, folders, place)
        Watch.opened, Watch.on = [], True
        try:
            opened()
            wrong.append(f"{case.name}: opened")
        except AdaptersError as fault:
            if "\n" in str(fault) or len(str(fault)) < 20:
                wrong.append(f"{case.name}: says {fault}")
        except Exception as fault:
            wrong.append(f"{case.name}: raw {type(fault).__name__}: {fault}")
        finally:
            Watch.on = False
        if (place / "outside" / "executed").exists():
            wrong.append(f"{case.name}: executed")
        strays = [path for path in Watch.opened if path.startswith(str((place / "outside").resolve()))]
        if strays or "/etc/passwd" in Watch.opened:
            wrong.append(f"{case.name}: read {strays}")
        if (place / "merged").exists():
            wrong.append(f"{case.name}: left a merged folder")
        shutil.rmtree(place)
    assert len(cases) >= 4
    assert wrong == []


def test_the_corpus_is_large_and_its_names_are_unique(folders: dict[str, Path]) -> None:
    names = [case.name for case in hostile.corpus(folders)]
    assert len(names) == len(set(names)) >= 500


def test_the_whole_folders_open(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind, folder in folders.items():
        assert hostile.open_as(kind, Path(shutil.copytree(folder, tmp_path / kind)), folders["backbone"]) is not None


# ---------------------------------------------------------------------- properties


def names(fault: AdaptersError, place: Path | str) -> None:
    """A refusal is one line that names its place."""
    assert str(place) in str(fault)
    assert "\n" not in str(fault)
    assert str(fault)


def intact(folder: Path) -> bytes:
    """Every tensor and the whole manifest of a folder, as bytes; raises where it is refused."""
    document = manifest.read_manifest(folder)
    tensors = manifest.read_tensors(folder, document)
    rest = json.dumps(document, sort_keys=True).encode()
    return rest + b"".join(name.encode() + bytes(shards.tensor_bytes(t)) for name, t in sorted(tensors.items()))


@pytest.fixture(scope="module")
def scratch(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    folder = Path(shutil.copytree(folders["adapter"], tmp_path_factory.mktemp("scratch") / "adapter"))
    return folder, {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.name != "README.md"}


@given(st.data())
@settings(EXAMPLES, max_examples=300)
def test_a_flipped_bit_is_caught_wherever_it_is(scratch: tuple[Path, dict[str, bytes]], data: st.DataObject) -> None:
    folder, files = scratch
    name = data.draw(st.sampled_from(sorted(files)))
    bit = data.draw(st.integers(0, 8 * len(files[name]) - 1))
    before = intact(folder)
    content = bytearray(files[name])
    content[bit // 8] ^= 1 << bit % 8
    (folder / name).write_bytes(content)
    try:
        # A flip in the blanks of the manifest may say the same thing; then it must say exactly that.
        assert intact(folder) == before
        assert name == manifest.MANIFEST
    except FolderError as fault:
        names(fault, folder)
    finally:
        (folder / name).write_bytes(files[name])


@given(st.data())
@settings(EXAMPLES, max_examples=100)
def test_a_truncated_file_is_caught_wherever_it_ends(
    scratch: tuple[Path, dict[str, bytes]], data: st.DataObject
) -> None:
    folder, files = scratch
    name = data.draw(st.sampled_from(sorted(files)))
    size = data.draw(st.integers(0, len(files[name].rstrip()) - 1))
    (folder / name).write_bytes(files[name][:size])
    try:
        with pytest.raises(FolderError):
            intact(folder)
    finally:
        (folder / name).write_bytes(files[name])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a document."""
    found = [path] if path else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inner:
        found += places_in(entry, (*path, key))
    return found


def mutated(document: dict[str, Any], draw: Any) -> None:
    """Put anything at a place of the document, take it away, or add beside it."""
    path = draw(st.sampled_from(places_in(document)))
    *parents, last = path
    target: Any = document
    for part in parents:
        target = target[part]
    what = draw(st.sampled_from(["replace", "delete", "add"]))
    if what == "delete":
        del target[last]
    elif what == "replace":
        target[last] = draw(JSON)
    elif isinstance(target, dict):
        target[draw(st.text(max_size=10))] = draw(JSON)
    else:
        target.append(draw(JSON))


@given(st.data())
@settings(EXAMPLES, max_examples=300)
def test_a_manifest_with_anything_in_it_is_refused_or_read_but_never_breaks_the_reader(
    scratch: tuple[Path, dict[str, bytes]], data: st.DataObject
) -> None:
    folder, files = scratch
    document = json.loads(files[manifest.MANIFEST])
    mutated(document, data.draw)
    try:
        hostile.write(folder, document)
        from adapters.inspection import describe, lines

        try:
            intact(folder)
            lines(describe(folder))
        except FolderError as fault:
            names(fault, folder)
    finally:
        (folder / manifest.MANIFEST).write_bytes(files[manifest.MANIFEST])


@given(st.data())
@settings(EXAMPLES, max_examples=40)
def test_options_with_anything_in_them_are_refused_or_loaded_but_never_break_load(
    scratch: tuple[Path, dict[str, bytes]], folders: dict[str, Path], data: st.DataObject
) -> None:
    folder, files = scratch
    document = json.loads(files[manifest.MANIFEST])
    for section in ("strategy", "task"):
        if data.draw(st.booleans()):
            mutated(document[section]["options"], data.draw)
    try:
        hostile.write(folder, document)
        try:
            adapted = adapters.load(folder, folders["backbone"])
            assert torch.isfinite(tiny.logits(adapted.model)).all()
        except AdaptersError as fault:
            names(fault, "")
    finally:
        (folder / manifest.MANIFEST).write_bytes(files[manifest.MANIFEST])


@given(st.data())
@settings(EXAMPLES, max_examples=300)
def test_a_header_is_read_as_safetensors_reads_it_or_refused(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    from safetensors import safe_open

    header, tail = hostile.unpack(folders["adapter"] / hostile.WEIGHTS)
    mutated(header, data.draw)
    file = tmp_path_factory.mktemp("header") / "x.safetensors"
    file.write_bytes(hostile.pack(json.dumps(header).encode(), tail))
    try:
        slots, _ = shards.read_header(file)
    except FolderError as fault:
        names(fault, file)
        return
    with safe_open(file, "pt") as theirs:
        assert set(theirs.keys()) == set(slots)
        for name, slot in slots.items():
            assert torch.equal(
                shards.read_tensor(slot).contiguous().view(torch.uint8),
                theirs.get_tensor(name).contiguous().view(torch.uint8),
            )


@given(JSON)
@settings(EXAMPLES, max_examples=300)
def test_json_is_read_as_python_reads_it_or_refused(value: Any) -> None:
    text = json.dumps(value)
    try:
        assert jsontext.parse(text.encode()) == json.loads(text)
    except ValueError:
        assert "NaN" in text or "Infinity" in text or "\\ud" in text or any(c.isdigit() for c in text)


@given(st.binary(max_size=200))
@settings(EXAMPLES, max_examples=300)
def test_bytes_that_are_no_json_are_refused(content: bytes) -> None:
    try:
        found = jsontext.parse(content)
    except ValueError:
        return
    assert found == json.loads(content.decode())


# ---------------------------------------------------------------------- what is refused, said clearly


def refused(call: Any, *said: str) -> None:
    with pytest.raises(AdaptersError) as caught:
        call()
    for words in said:
        assert words in str(caught.value), f"{words!r} is not in: {caught.value}"


def test_pointers_and_pages_are_called_by_their_names(copy: Path) -> None:
    file = copy / hostile.WEIGHTS
    for said in ("a pointer", "a page"):
        file.write_bytes(hostile.TEXTS[said])
        hostile.seal(copy)
        named = {"a pointer": ("git-lfs pointer", "git lfs pull"), "a page": ("HTML page",)}[said]
        refused(lambda: adapters.load(copy), str(file), *named)
        file.write_bytes(b"")
    (copy / "adapter.json").write_bytes(hostile.TEXTS["a pointer"])
    refused(lambda: adapters.load(copy), "adapter.json", "git-lfs pointer")


def test_links_of_the_hubs_cache_are_followed_and_no_others(folders: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "models--me--mine"
    snapshot, blobs = root / "snapshots" / "abc", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for entry in folders["adapter"].iterdir():
        shutil.copy(entry, blobs / f"blob-{entry.name}")
        (snapshot / entry.name).symlink_to(f"../../blobs/blob-{entry.name}")
    assert adapters.load(snapshot, folders["backbone"]).task.labels == tuple(LABELS)
    (snapshot / "notes.txt").symlink_to("/etc/hostname")
    refused(lambda: adapters.load(snapshot), "a link", "notes.txt", "/etc/hostname")


def test_a_folder_itself_may_be_a_link(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(folders["adapter"])
    (tmp_path / "model").symlink_to(folders["backbone"])
    assert adapters.load(tmp_path / "latest", tmp_path / "model").task.labels == tuple(LABELS)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("./x", True),
        ("../x", True),
        ("/x", True),
        ("~/x", True),
        ("x/", True),
        ("a/b/c", True),
        ("runs\\one", True),
        ("runs/one", True),  # there is a folder runs
        ("google/bert", False),
        ("bert-base", False),
    ],
)
def test_which_names_are_places(name: str, place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert places.is_path(name) is place


def test_a_backbone_that_was_a_folder_is_never_looked_up(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    import transformers

    def look(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"looked up {args}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", look)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", look)
    monkeypatch.chdir(tmp_path)
    hostile.at("backbone/name", "outputs/run1")(copy, tmp_path)
    refused(lambda: adapters.load(copy), "no such model folder", "outputs/run1", "no name of the hub")
    refused(lambda: adapters.merge_on_disk(copy, tmp_path / "out"), "outputs/run1")
    assert not (tmp_path / "out").exists()


def test_code_of_a_backbone_runs_only_where_the_caller_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["backbone"], tmp_path / "own"))
    hostile.own_code("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}})(folder, tmp_path)
    refused(lambda: adapters.adapt(str(folder), labels=LABELS), "cannot be loaded", "trust_remote_code")
    assert not (tmp_path / "executed").exists()
    said = {"trust_remote_code": "yes"}
    refused(lambda: adapters.adapt(str(folder), labels=LABELS, load=said), "trust_remote_code", "True or False")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(AdaptersError):  # the class is none; but its file was run, as the caller said
        adapters.adapt(str(folder), labels=LABELS, load={"trust_remote_code": True})
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("load", "remedy"),
    [
        ({"subfolder": "sub"}, "base/sub"),
        ({"variant": "fp16"}, "a folder of its own"),
        ({"gguf_file": "model.gguf"}, "save_pretrained"),
        ({"state_dict": {"a": 1}}, "save_pretrained"),
        ({"use_safetensors": False}, "Leave it out"),
    ],
)
def test_weights_that_the_name_does_not_stand_for_are_refused(
    folders: dict[str, Path], load: dict[str, Any], remedy: str
) -> None:
    """They would be trained on, and others fingerprinted, merged into and opened again."""
    refused(
        lambda: adapters.adapt(str(folders["backbone"]), labels=LABELS, load=load),
        *(f"load: {next(iter(load))}", "other weights", remedy),
    )


def test_settings_that_no_adapter_brings_are_refused(folders: dict[str, Path]) -> None:
    """They would be trained with, and the adapter opened without them. What is gone after training may be changed."""
    base = str(folders["backbone"])
    refused(
        lambda: adapters.adapt(base, labels=LABELS, load={"layer_norm_eps": 0.5}),
        *("load: layer_norm_eps", "0.5", "config.json"),
    )
    same = json.loads((folders["backbone"] / "config.json").read_text())["layer_norm_eps"]
    given = {"hidden_dropout_prob": 0.3, "layer_norm_eps": same, "initializer_range": 0.1, "dtype": "float32"}
    adapted = adapters.adapt(base, labels=LABELS, load=given)
    assert adapted.model.config.hidden_dropout_prob == 0.3


def test_a_live_model_with_other_settings_is_said(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoModelForSequenceClassification

    base = str(folders["backbone"])
    for changes, words in (({"layer_norm_eps": 0.5}, "layer_norm_eps is 0.5, was 1e-12"), ({}, "")):
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=3, hidden_dropout_prob=0.3, **changes
        )
        caplog.clear()
        adapted = adapters.adapt(model, labels=LABELS)
        said = [note for note in adapted.record.notes if "settings are not those" in note]
        assert len(said) == len(changes)
        assert all(words in note and note in caplog.text for note in said)


def test_an_adapter_never_says_that_code_may_run(folders: dict[str, Path], tmp_path: Path) -> None:
    options = {"trust_remote_code": True, "dtype": "float32"}
    adapted = adapters.adapt(str(folders["backbone"]), "probe", labels=LABELS, load=options)
    saved = adapters.save(adapted, tmp_path / "out")
    assert json.loads((saved / "adapter.json").read_text())["backbone"]["load"] == {"dtype": "float32"}
    assert adapters.load(saved).record.load == {"dtype": "float32"}


def test_names_of_code_are_not_saved_with_a_processor(folders: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(folders["backbone"], tmp_path / "base"))
    settings_of = base / "tokenizer_config.json"
    said = json.loads(settings_of.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Own", None]}}
    settings_of.write_text(json.dumps(said))
    saved = adapters.save(adapters.adapt(str(base), "probe", labels=LABELS), tmp_path / "out")
    assert "auto_map" not in (saved / "tokenizer_config.json").read_text()
    assert adapters.load(saved).processor is not None


def test_a_plain_peft_folder_of_another_float_type_loads(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["peft"], tmp_path / "peft"))

    def halve(found: dict[str, Any]) -> None:
        found.update({name: tensor.half() for name, tensor in found.items()})

    hostile.tensors(hostile.WEIGHTS, halve)(folder, tmp_path)
    assert adapters.load(folder, tiny.model("bert")).trained


def test_a_binary_tokenizer_file_is_merged_byte_for_byte(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["adapter"], tmp_path / "adapter"))
    content = bytes(range(256))
    hostile.listed("spiece.model", content)(folder, tmp_path)
    out = tmp_path / "merged"
    adapters.merge_on_disk(folder, out, base=folders["backbone"], check_logits=False)
    assert (out / "spiece.model").read_bytes() == content


def test_an_index_may_not_hide_behind_other_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(folders["backbone"], tmp_path / "base"))
    (base / shards.INDEX).write_text(json.dumps({"weight_map": {"x": "one.safetensors"}}))
    refused(lambda: adapters.adapt(str(base), labels=LABELS), "two sets of weights", str(base))


def test_a_header_length_is_bounded_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", shards.MAX_HEADER + 1))
    os.truncate(file, shards.MAX_HEADER + 100)  # takes no room on the disk
    refused(lambda: shards.read_header(file), "header length", str(file))


# ---------------------------------------------------------------------- chat templates

ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{% set n = 9 %}{{ (n ** (n ** n)) % 7 }}",
    "a doubling text": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_an_end_is_stopped_with_its_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = rendering.Renderer(seconds=1)
    monkeypatch.setattr(rendering, "_renderer", renderer)
    processor = tiny.tokenizer()
    # It behaves for the first rows: what is tried once is not yet safe.
    processor.chat_template = "{% if messages[0].content == 'go' %}" + ENDLESS[name] + "{% endif %}said"
    turns = [{"role": "user", "content": "wait"}]
    assert chats.asked(turns, processor, 0) == processor("said", add_special_tokens=False)["input_ids"]
    with pytest.raises(DataError, match=r"row 7, column 'messages'.*(was stopped|MemoryError|Exceeds)"):
        chats.asked([{"role": "user", "content": "go"}], processor, 7)
    assert chats.asked(turns, processor, 8)  # and the next row has a process again
    renderer.close()


def test_a_template_stays_in_its_sandbox() -> None:
    processor = tiny.tokenizer()
    for template in (
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__init__.__globals__.__builtins__.open('/etc/passwd').read() }}",
        "{% include '/etc/passwd' %}",
    ):
        processor.chat_template = template
        with pytest.raises(DataError, match="row 0"):
            chats.asked([{"role": "user", "content": "x"}], processor, 0)


def test_what_is_rendered_apart_is_what_transformers_renders() -> None:
    processor = tiny.tokenizer()
    processor.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
    turns = [{"role": "user", "content": "the parcel"}, {"role": "assistant", "content": "is late \u00e9\n"}]
    for template in (chats.TEMPLATES["chatml"], "{{ bos_token }}{{ messages | tojson }}{{ add_generation_prompt }}"):
        processor.chat_template = template
        for options in ({"add_generation_prompt": True}, {"add_generation_prompt": False}):
            text, _ = rendering.rendered(turns, processor, 0, **options)
            assert text == processor.apply_chat_template(turns, tokenize=False, **options)


def test_a_lost_renderer_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = rendering.Renderer()
    turns = [{"role": "user", "content": "x"}]
    assert renderer.render("{{ messages[0].content }}", turns) == ("x", [])
    child = renderer._child
    assert child is not None
    child.kill()
    child.wait()
    assert renderer.render("again", turns)[0] == "again"
    renderer.close()
    assert renderer._child is None


def test_a_request_error_is_not_a_folder_s(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such model folder"):
        adapters.adapt(tmp_path / "missing", labels=LABELS)
