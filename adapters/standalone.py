"""An adapter folder with its backbone in it: a merge that no plain transformers folder can say.

The backbone is a plain transformers folder of its own; beside it lie the head and the task, which say where the head
reads. `adapters.load` opens the whole wherever it lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from adapters import shards
from adapters.facts import described as described_tensors
from adapters.facts import hand_on
from adapters.fingerprint import Fingerprint, print_of_slot
from adapters.manifest import CARD, RECIPE, WEIGHTS, seal
from adapters.strategies.probe import Probe

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.stream import Step

BACKBONE: Final = "backbone"  # the folder in the folder


def write(stage: Path, adapter: Path, document: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write what lies beside a backbone that has been written already: head, processor, manifest last; all read back.

    Args:
        stage: the folder; it holds `BACKBONE`.
        adapter: the folder of the adapter that was merged, for its processor's files.
        document: its manifest.
        facts: of `described`.
    """
    shards.save_tensors(stage / WEIGHTS, dict(facts["tensors"]), {"format": "pt", "holdfast": str(document["format"])})
    hand_on(adapter, document, stage)
    made = _manifest(document, facts)
    shards.write_text(stage / CARD, _card(made))
    seal(stage, made)


def described(
    backbone: Path, steps: Sequence[Step], head: Mapping[str, Tensor], prefix: str, task: Mapping[str, Any]
) -> dict[str, Any]:
    """What the manifest says of the two parts.

    Args:
        backbone: the written folder; steps: its tensors.
        head: the trained tensors that lie beside it, by their own names.
        prefix: of the base model in checkpoints.
        task: name and options, as they read that backbone.
    """
    slots = shards.read_directory(backbone)
    prints = {step.plain: print_of_slot(slots[step.name]) for step in steps if step.plain}
    return {
        "tensors": {name: tensor.contiguous() for name, tensor in sorted(head.items())},
        "fingerprint": Fingerprint(prints, prefix).to_json(),
        "bytes": sum(step.nbytes for step in steps),
        "saved_as": {step.plain: step.name for step in steps if step.plain and step.name != f"{prefix}.{step.plain}"},
        "task": dict(task),
    }


def _manifest(document: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The old manifest, with a probe on the new backbone in its place."""
    old = document["backbone"]
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in facts["tensors"].values()}
    kept = {name: value for name, value in old["config"].items() if name != "vocab_size"}
    return {
        **{name: value for name, value in document.items() if name not in ("files", "digest")},
        "strategy": {"name": Probe.name, "options": {}},
        "task": facts["task"],
        "backbone": {
            **old,
            "name": BACKBONE,
            "inside": True,
            "revision": None,
            "quantization": None,
            "packed": {},
            "dtype": old["dtype"] if old["dtype"] in dtypes else sorted(dtypes)[0],
            "load": {},
            "config": kept,
            "saved_as": facts["saved_as"],
            "bytes": facts["bytes"],
            "fingerprint": facts["fingerprint"],
        },
        "head": list(facts["tensors"]),
        "new": list(facts["tensors"]),
        "tensors": described_tensors(facts["tensors"]),
        "vocabulary": None,
        "notes": [*document["notes"], f"merged from a {document['strategy']['name']} adapter"],
        "reproducible": False,
        "why_not_reproducible": f"merged from a {document['strategy']['name']} adapter; its own folder has the recipe",
    }


def _card(document: Mapping[str, Any]) -> str:
    options = document["task"]["options"]
    read = ", ".join(f"{name}={options[name]}" for name in ("pooling", "layer") if name in options)
    return "\n".join(
        [
            f"# {document['task']['name']}: a backbone with a head of its own beside it",
            "",
            f"`{BACKBONE}/` is a plain transformers model: {document['backbone']['model_class']} without its head.",
            f"The head in `{WEIGHTS}` reads it as that class does not ({read}), so the two are opened together.",
            f"The folder may be moved or copied whole; `{RECIPE}` stayed with the adapter that was merged.",
            "",
            "```python",
            "import adapters",
            "",
            'adapted = adapters.load("this folder")',
            'adapters.predict(adapted, ["..."])',
            "```",
            "",
        ]
    )
