"""A plain transformers model again: edits applied in memory, or streamed from disk to disk.

The stream reads, edits and writes one tensor at a time, whatever the size of the model, checks the backbone's
fingerprint as it passes, and reads back what it wrote. It imports torch, but neither peft (unless the strategy's
own merge needs it) nor a model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters import shards
from adapters.contracts import Adapted
from adapters.errors import AdaptersError, BackboneError, FolderError, NumbersError, RequestError, message
from adapters.shards import INDEX, WEIGHTS, Slot
from adapters.storage import fetch, read_manifest, read_tensors, strategy_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.edits import Edit

# How far merged logits may lie from adapted ones, as a share of the logits' spread, by the coarsest dtype at work.
BOUNDS = {"float32": 1e-4, "float64": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
ROWS = 8  # rows of the logits check
MARK = "merged_adapters"  # config field that names what has been merged into a checkpoint


@final
@dataclass(frozen=True)
class MergeReport:
    """What a merge on disk did and how exact it is.

    Attributes:
        output: the written folder.
        tensors: tensors written; edited: of these, changed by the adapter; created: of these, new.
        bytes: size of the weights written.
        dtype: dtype of the edited tensors.
        verified: edited tensors whose written bytes, read again, equal the edit computed again.
        max_difference, mean_difference: between the logits of the merged and the adapted model, absolute.
        agreement: share of rows whose best answer is the same.
        spread: standard deviation of the adapted model's logits.
        logits_checked: False where the model does not fit into memory; then `skipped` says why.
    """

    output: str
    tensors: int
    edited: int
    created: int
    bytes: int
    dtype: str
    verified: int
    max_difference: float | None = None
    mean_difference: float | None = None
    agreement: float | None = None
    spread: float | None = None
    logits_checked: bool = False
    skipped: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


# ---------------------------------------------------------------------- in memory


def merge(adapted: Adapted) -> PreTrainedModel:
    """Put what was trained into the live model, take the adapters out, and return it: plain transformers again.

    `adapted` is spent afterwards.

    Raises:
        RequestError: packed storage, into which a merge is lossy.
        SpentError: merged already.
    """
    import torch

    state = {name: tensor.clone() for name, tensor in adapted.state().items()}
    if adapted.storage.quantization is not None:
        raise RequestError(
            message(
                "a merge into packed weights is lossy",
                where=f"quantization {adapted.storage.quantization!r}",
                remedy="Save the adapter and merge it into the full-precision backbone: "
                "adapters.merge_on_disk(folder, output).",
            )
        )
    edits = adapted.strategy.edits(state)
    model = adapted.model
    adapted.strategy.strip(model)
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    unknown = sorted(set(edits) - set(tensors))
    if unknown:
        raise RequestError(message("trained tensors that the model does not have", where=", ".join(unknown[:3])))
    with torch.no_grad():
        for name, edit in edits.items():
            old = tensors[name]
            old.copy_(edit(old.detach()).to(old.dtype))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    adapted.record.spent = True
    return model


# ---------------------------------------------------------------------- on disk


@final
@dataclass(frozen=True)
class _Step:
    """One tensor of the output: where it comes from, what happens to it, how it is written."""

    name: str
    source: Slot | None
    plain: str
    edit: Edit | None
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        import torch

        total: int = torch.tensor([], dtype=getattr(torch, self.dtype)).element_size()
        for size in self.shape:
            total *= size
        return total


def merge_on_disk(
    folder: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    rows: list[str] | None = None,
    check_logits: bool = True,
) -> MergeReport:
    """Write a plain transformers folder: the backbone with the adapter's edits in it.

    Args:
        folder: an adapter folder.
        out: the folder to write; must be new, empty, or a merge of ours.
        base: the backbone's folder, where it is not the one that the adapter names.
        dtype: of the written tensors, e.g. "bfloat16"; None keeps each tensor's own.
        rows: texts for the logits check; None makes synthetic ones.
        check_logits: compare the logits of the merged and the adapted model in a child process.

    Returns:
        The report; its differences lie within the stated bound.

    Raises:
        BackboneError: the base is not the adapter's backbone; nothing is left behind.
        FolderError: a damaged folder, or an output that holds something else.
        NumbersError: the written model does not answer as the adapted one does.
    """
    adapter = fetch(folder)
    document = read_manifest(adapter)
    where = str(adapter)
    target = Path(out).expanduser()
    _refuse_output(target)
    edits = strategy_of(document, where).edits(read_tensors(adapter, document))
    source = _base_folder(document, base, where)
    steps = _plan(document, edits, shards.read_directory(source), dtype, str(source))
    with shards.staged(target) as stage:
        written = _write(stage, steps, source, document)
        verified = _verify(stage, steps, written)
        _write_config(stage, source, adapter, document, dtype)
        edited = [step for step in steps if step.edit is not None]
        report = MergeReport(
            output=str(target),
            tensors=len(steps),
            edited=len(edited),
            created=sum(step.source is None for step in edited),
            bytes=sum(step.nbytes for step in steps),
            dtype=edited[0].dtype if edited else steps[0].dtype,
            verified=verified,
        )
        return _with_fidelity(report, stage, adapter, source, document, rows) if check_logits else report


def _refuse_output(target: Path) -> None:
    content = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    ours = False
    if "config.json" in content:
        try:
            ours = MARK in json.loads((target / "config.json").read_text())
        except ValueError:
            ours = False
    if target.is_symlink() or (target.exists() and not target.is_dir()) or (content and not ours):
        raise FolderError(
            message(
                "the output folder already holds something else",
                where=str(target),
                expected="a new or empty folder, or an earlier merge",
                found=", ".join(content[:5]) or "not a folder",
                remedy="Give another output.",
            )
        )


def _base_folder(document: Mapping[str, Any], base: str | Path | None, where: str) -> Path:
    from adapters.adapt import local_folder

    name = str(base) if base is not None else document["backbone"]["name"]
    if not name:
        raise RequestError(
            message("the adapter was made on a live model without a name", where=where, remedy="Give base=folder.")
        )
    options = {} if base is not None else {"revision": document["backbone"]["revision"]}
    found = local_folder(name, options)
    if found is None and (base is not None or name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise RequestError(message("there is no such backbone folder", where=name, remedy="Give base=folder."))
    if found is None:
        from huggingface_hub import snapshot_download

        try:
            found = Path(snapshot_download(name, revision=document["backbone"]["revision"] or None))
        except Exception as fault:  # the hub client raises a family of its own, and whatever the network raises
            raise RequestError(
                message(
                    "the backbone is neither here nor to be had from the hub",
                    where=name,
                    found=" ".join(str(fault).split())[:200],
                    remedy="Give base=folder.",
                )
            ) from fault
    return found


def _plan(
    document: Mapping[str, Any], edits: Mapping[str, Edit], slots: Mapping[str, Slot], dtype: str | None, where: str
) -> list[_Step]:
    """Every tensor of the output in the order of the backbone's files, named as this model class saves it."""
    backbone = document["backbone"]
    prefix = backbone["fingerprint"]["prefix"]
    names: Mapping[str, str] = backbone["names"]
    saved_as: Mapping[str, str] = backbone["saved_as"]
    known = set(backbone["fingerprint"]["tensors"])
    if dtype is not None and dtype not in shards.NAMES:
        raise RequestError(message(f"unknown dtype {dtype!r}", where="dtype", expected=", ".join(sorted(shards.NAMES))))
    edits = _on_packed(backbone, edits)
    pending = {names.get(name, name): edit for name, edit in edits.items()}
    head = {names.get(name, name) for name in document["head"]}
    steps: list[_Step] = []
    covered = set()
    for disk_name, slot in slots.items():
        plain = _plain_of(disk_name, prefix, known, names)
        name = saved_as.get(plain, f"{prefix}.{plain}" if prefix else plain)
        if disk_name in head:
            continue  # the adapter brings its own, of another size perhaps
        edit = pending.pop(name, None) or pending.pop(disk_name, None)
        if plain not in known and edit is None:
            continue  # heads that the adapted model class does not have
        if plain in covered:
            raise FolderError(message("the backbone holds a tensor twice", where=f"{where}: {disk_name}"))
        covered.add(plain)
        floating = "float" in slot.dtype
        steps.append(
            _Step(
                name if plain in known else disk_name,
                slot,
                plain if plain in known else "",
                edit,
                dtype if dtype and floating else slot.dtype,
                slot.shape,
            )
        )
    missing = sorted(known - covered)
    if missing:
        raise BackboneError(
            message(
                "the base lacks tensors of the adapter's backbone",
                where=where,
                found=f"{len(missing)} missing, {missing[0]} first",
                remedy="Give the folder of the backbone that the adapter was trained on.",
            )
        )
    like = dtype or (steps[0].dtype if steps else "float32")
    for name, edit in pending.items():
        new = edit(None)  # only a replacement can create a tensor; any other edit refuses
        steps.append(_Step(name, None, "", edit, like, tuple(new.shape)))
    return steps


def _on_packed(backbone: Mapping[str, Any], edits: Mapping[str, Edit]) -> dict[str, Edit]:
    """The edits, preceded by the trip through 4 bits wherever the adapter was trained on packed weights."""
    kind = backbone["quantization"]
    if kind is None:
        return dict(edits)
    from adapters.quantize import RoundTrip

    packed = {
        name: RoundTrip(kind, backbone["dtype"], transposed, edits.get(name))
        for name, transposed in backbone["packed"].items()
    }
    return {**edits, **packed}


def _plain_of(disk_name: str, prefix: str, known: set[str], names: Mapping[str, str]) -> str:
    """The fingerprint's name of a tensor on disk: with or without the base model's prefix, or an older spelling."""
    bare = disk_name.removeprefix(f"{prefix}.") if prefix else disk_name
    if bare in known:
        return bare
    # Checkpoints from before 2019 spell LayerNorm's parameters as TensorFlow did; transformers renames them on load.
    modern = bare.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return modern if modern in known else bare


def _write(stage: Path, steps: list[_Step], source: Path, document: Mapping[str, Any]) -> dict[str, str]:
    """Write the weights in the shards of the source, each checked against the fingerprint as it passes.

    Returns:
        xxh3 of the written bytes, by tensor name.
    """
    by_file: dict[str, list[_Step]] = {}
    last = next((step.source.file.name for step in reversed(steps) if step.source is not None), WEIGHTS)
    for step in steps:
        by_file.setdefault(step.source.file.name if step.source is not None else last, []).append(step)
    need = sum(step.nbytes for step in steps)
    room = os.statvfs(stage)
    if room.f_bavail * room.f_frsize < need:
        raise RequestError(
            message(
                "the disk is too full for the merged model",
                where=str(stage.parent),
                expected=f"{need:,} bytes",
                found=f"{room.f_bavail * room.f_frsize:,} bytes free",
            )
        )
    prints = document["backbone"]["fingerprint"]["tensors"]
    digests: dict[str, str] = {}
    for file_name, part in by_file.items():
        with (stage / file_name).open("xb") as stream:
            entries = {step.name: (step.dtype, step.shape, step.nbytes) for step in part}
            stream.write(shards.header_bytes(entries, {"format": "pt"}))
            for step in part:
                digests[step.name] = _write_one(stream, step, prints)
            shards.flush(stream)
    if (source / INDEX).exists():
        weight_map = {step.name: file for file, part in by_file.items() for step in part}
        index = {"metadata": {"total_size": need}, "weight_map": dict(sorted(weight_map.items()))}
        shards.write_text(stage / INDEX, json.dumps(index, indent=2) + "\n")
    return digests


def _write_one(stream: Any, step: _Step, prints: Mapping[str, Any]) -> str:
    import xxhash

    written = xxhash.xxh3_128()
    if step.source is not None and step.edit is None and step.dtype == step.source.dtype:
        for chunk in shards.read_bytes(step.source):
            written.update(chunk)
            stream.write(chunk)
        _expect(step, prints, written.hexdigest())
        return written.hexdigest()
    if step.source is not None:
        whole = xxhash.xxh3_128()
        for chunk in shards.read_bytes(step.source):
            whole.update(chunk)
        _expect(step, prints, whole.hexdigest())
    for piece in _result(step):
        written.update(piece)
        stream.write(piece)
    return written.hexdigest()


def _expect(step: _Step, prints: Mapping[str, Any], digest: str) -> None:
    """The source tensor must be the recorded one: by its hash, or by its samples where dtypes differ."""
    from adapters.fingerprint import Fingerprint, TensorPrint, differences, print_of_slot

    if not step.plain or step.source is None:
        return
    recorded = TensorPrint.from_json(prints[step.plain])
    if recorded.dtype == step.source.dtype and recorded.hash:
        same = recorded.hash == digest and recorded.shape == step.source.shape
    else:
        found = Fingerprint({step.plain: print_of_slot(step.source, full=False)}, "")
        same = not differences(Fingerprint({step.plain: recorded}, ""), found)
    if not same:
        raise BackboneError(
            message(
                "this is not the backbone that the adapter was trained on",
                where=f"{step.source.file}: {step.name}",
                expected="the recorded values",
                found="other values",
                remedy="Give the right base.",
            )
        )


def _result(step: _Step) -> Iterator[memoryview]:
    """The bytes of an edited or cast tensor."""
    import torch

    old = shards.read_tensor(step.source) if step.source is not None else None
    if step.edit is not None:
        new = step.edit(old)
    else:
        assert old is not None
        new = old
    del old
    if not bool(torch.isfinite(new).all()):
        raise NumbersError(message("the merged tensor is not finite", where=step.name))
    yield shards.tensor_bytes(new.to(getattr(torch, step.dtype)))


def _verify(stage: Path, steps: list[_Step], written: Mapping[str, str]) -> int:
    """Read every tensor again: its bytes are those that were written, and for edited ones those of a second edit."""
    import xxhash

    slots = {}
    for file in sorted(stage.glob("*.safetensors")):
        slots.update(shards.read_header(file)[0])
    verified = 0
    for step in steps:
        again = xxhash.xxh3_128()
        for chunk in shards.read_bytes(slots[step.name]):
            again.update(chunk)
        expected = again.hexdigest() if step.edit is None else _digest_of_result(step)
        if again.hexdigest() != written[step.name] or again.hexdigest() != expected:
            raise NumbersError(message("a written tensor reads back otherwise", where=step.name))
        verified += step.edit is not None
    return verified


def _digest_of_result(step: _Step) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    for piece in _result(step):
        digest.update(piece)
    return digest.hexdigest()


def _write_config(stage: Path, source: Path, adapter: Path, document: Mapping[str, Any], dtype: str | None) -> None:
    """config.json with the task's labels, the source's generation config, the adapter's processor files."""
    backbone = document["backbone"]
    config = json.loads((source / "config.json").read_text())
    config |= {key: value for key, value in backbone["config"].items() if key != "num_labels"}
    if "num_labels" in backbone["config"] and "id2label" not in backbone["config"]:
        count = backbone["config"]["num_labels"]
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(count)}
    config["architectures"] = [backbone["model_class"]]
    config[MARK] = [*config.get(MARK, []), document["digest"]]
    if dtype is not None:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    shards.write_text(stage / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    generation = source / "generation_config.json"
    if generation.is_file():
        shards.write_text(stage / generation.name, generation.read_text())
    skipped = {"adapter_model.safetensors", "adapter_config.json"}
    for name in document["files"]:
        if name not in skipped:
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shards.write_text(stage / name, (adapter / name).read_text(encoding="utf-8"))


# ---------------------------------------------------------------------- fidelity


def _with_fidelity(
    report: MergeReport, stage: Path, adapter: Path, source: Path, document: Mapping[str, Any], rows: list[str] | None
) -> MergeReport:
    """Compare logits of the merged and the adapted model in a child process, where both fit into memory."""
    free = _free_memory()
    need = 3 * max(document["backbone"]["bytes"], report.bytes)
    if free is not None and need > free:
        return _replaced(report, skipped=f"the logits check needs about {need:,} bytes of memory, {free:,} are free")
    request = {"adapter": str(adapter), "merged": str(stage), "base": str(source), "rows": rows}
    root = str(Path(__file__).resolve().parents[1])
    child = subprocess.run(
        [sys.executable, "-c", "import sys, adapters.fidelity as f; f.main(sys.stdin.read())"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
    )
    if child.returncode != 0:
        raise AdaptersError(
            message("the logits check broke", where=str(stage), found=" ".join(child.stderr.split())[-500:])
        )
    found = json.loads(child.stdout.strip().splitlines()[-1])
    coarsest = min((report.dtype, found.pop("dtype")), key=lambda name: -BOUNDS.get(name, 1.0))
    bound = BOUNDS[coarsest] * max(found["spread"], 1e-6)
    if found["max_difference"] > bound:
        raise NumbersError(
            message(
                "the merged model does not answer as the adapted one does",
                where=f"{report.output}, {ROWS} rows",
                expected=f"logits within {bound:.2e} ({BOUNDS[coarsest]} of their spread, {coarsest})",
                found=f"{found['max_difference']:.2e} apart",
                remedy="Nothing was written. Merge with dtype='float32'.",
            )
        )
    return _replaced(report, logits_checked=True, **found)


def _replaced(report: MergeReport, **changes: Any) -> MergeReport:
    return MergeReport(**{**asdict(report), **changes})


def _free_memory() -> int | None:
    """Bytes that a new process can have, None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
