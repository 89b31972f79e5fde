"""The laws of the house over strategies x backbones: one cell trains, is saved, reloaded, merged and stripped.

A cell that cannot be is a row of REFUSALS with the error that says so.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import adapters
from adapters.anatomy import own_name

CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "full-decay": ("full", {"layer_decay": 0.8}),
    "freeze": ("freeze", {"layers": 1}),
    "freeze-pattern": ("freeze", {"pattern": r"\b2\b"}),
    "probe": ("probe", {}),
    "bitfit": ("bitfit", {}),
    "lora": ("lora", {}),
    "lora-dropout": ("lora", {"lora_dropout": 0.1, "r": 4}),
    "rslora": ("rslora", {"r": 4}),
    "dora": ("dora", {}),
    "pissa": ("pissa", {"r": 4}),
    "pissa-fast": ("pissa", {"r": 4, "init_lora_weights": "pissa_niter_4", "rank_pattern": {r".*\b1\b.*": 3}}),
    "olora": ("rslora", {"r": 4, "init_lora_weights": "olora"}),
    "orthogonal": ("lora", {"init_lora_weights": "orthogonal"}),
    "lora-bias": ("lora", {"bias": "all"}),
    "lora-layers": ("lora", {"layers_to_transform": [1, 2]}),
    "qlora": ("qlora", {}),
    "probe-nf4": ("probe", {"quantization": "nf4"}),
    "freeze-nf4": ("freeze", {"quantization": "nf4", "layers": 1}),
    "bitfit-nf4": ("bitfit", {"quantization": "nf4"}),
    "ia3": ("ia3", {}),
    "oft": ("oft", {"oft_block_size": 8}),
    "boft": ("boft", {}),
    "loha": ("loha", {"r": 4}),
    "lokr": ("lokr", {}),
    "hra": ("hra", {"bias": "all"}),
    "oft-nf4": ("oft", {"oft_block_size": 8, "quantization": "nf4"}),
    "pissa-nf4": ("pissa", {"r": 4, "quantization": "nf4"}),
    "a peft config": ("LoHaConfig", {"target_modules": r".*1.*"}),
}
CONV1D = r"peft refuses .*\.h\.[01]\.\S+ \(Conv1D\).*'lora' or 'ia3'"
REFUSALS = {
    ("bitfit", "llama"): "no biases",
    ("bitfit-nf4", "llama"): "no biases",
    **{(cell, "gpt2"): CONV1D for cell in ("oft", "boft", "loha", "lokr", "hra", "a peft config")},
    ("oft-nf4", "gpt2"): r"OFTConfig on 4-bit layers .*Conv1D",
}
TARGET = {"bert": "query", "roberta": "query", "gpt2": "c_attn", "llama": "q_proj"}
KINDS = list(tiny.KINDS)
PACKED = {cell for cell in CELLS if cell == "qlora" or cell.endswith("-nf4")}


def strategy_of(cell: str) -> tuple[Any, dict[str, Any]]:
    name, options = CELLS[cell]
    if name.endswith("Config"):
        import peft

        return getattr(peft, name)(**options), {}
    return name, options


def adapt(cell: str, base: Any, **more: Any) -> adapters.Adapted:
    strategy, options = strategy_of(cell)
    labels = {} if not isinstance(base, str) else {"labels": list(tiny.LABELS)}
    return adapters.adapt(base, strategy, task="text-classification", **labels, **options, **more)


def frozen_bytes(adapted: adapters.Adapted) -> dict[str, bytes]:
    """Every stored byte that does not train, packed weights and their scales included."""
    trained = set(adapted.trained)
    return {
        name: tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        for name, tensor in adapted.model.state_dict().items()
        if isinstance(tensor, torch.Tensor) and name not in trained
    }


@dataclasses.dataclass
class Cell:
    """One trained cell and what was seen on the way."""

    name: str
    kind: str
    adapted: adapters.Adapted
    folder: Path
    logits: torch.Tensor
    before: dict[str, bytes]
    after: dict[str, bytes]
    start: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("backbones")
    return {kind: tiny.folder(kind, root / kind) for kind in tiny.KINDS}


@pytest.fixture(scope="module")
def trained(backbones: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Cells by (name, kind), each trained once."""
    made: dict[tuple[str, str], Cell] = {}

    def build(cell: str, kind: str) -> Cell:
        if (cell, kind) not in made:
            folder = tmp_path_factory.mktemp(f"{cell}-{kind}")
            adapted = adapt(cell, backbones[kind])
            start = {name: tensor.clone() for name, tensor in adapted.state().items()}
            before = frozen_bytes(adapted)
            arguments = {
                "output_dir": str(folder / "run"),
                "max_steps": 3,
                "learning_rate": 1e-2,
                "warmup_steps": 0,
                "lr_scheduler_type": "constant",
                "disable_tqdm": True,
                "save_strategy": "no",
                "report_to": "none",
            }
            trainer = adapters.Trainer(adapted, arguments, tiny.rows(24))
            trainer.train()
            adapters.evaluate(adapted, tiny.rows(12, seed=1))
            after = frozen_bytes(adapted)
            adapters.save(adapted, folder / "adapter")
            logits = tiny.logits(adapted.model)
            made[cell, kind] = Cell(cell, kind, adapted, folder / "adapter", logits, before, after, start)
        return made[cell, kind]

    return build


def fits(kind: str) -> list[str]:
    return [cell for cell in CELLS if (cell, kind) not in REFUSALS]


def all_cells() -> list[Any]:
    return [pytest.param(cell, kind, id=f"{cell}-{kind}") for kind in tiny.KINDS for cell in fits(kind)]


@pytest.mark.parametrize(("cell", "kind"), list(REFUSALS), ids=lambda value: value)
def test_refusals_say_why_and_change_nothing(cell: str, kind: str) -> None:
    model = tiny.model(kind)
    types = {name: type(module) for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(adapters.RequestError, match=REFUSALS[cell, kind]):
        adapt(cell, model)
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("cell", "kind"), all_cells())
def test_law_1_names_are_the_backbones_own(cell: str, kind: str, trained: Any, backbones: dict[str, str]) -> None:
    model = tiny.model(kind)
    modules = dict(model.named_modules())
    names = [name for name, _ in model.named_parameters()]
    state = copy.deepcopy(model.state_dict())
    if cell in PACKED:
        document = json.loads((trained(cell, kind).folder / "adapter.json").read_text())
        written = {name.removeprefix("base_model.model.") for name in document["tensors"]}
        assert not any("base_layer" in name or ".default" in name for name in written)
        return
    adapted = adapt(cell, model)
    assert adapted.model is model
    for name in adapted.trained:
        assert "base_layer" not in own_name(name)
    adapted.strategy.strip(model)
    assert dict(model.named_modules()) == modules  # the very objects
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(("cell", "kind"), all_cells())
def test_law_2_frozen_bytes_stay(cell: str, kind: str, trained: Any) -> None:
    made = trained(cell, kind)
    assert made.before.keys() == made.after.keys()
    changed = [name for name, content in made.before.items() if made.after[name] != content]
    assert changed == []


@pytest.mark.parametrize(("cell", "kind"), all_cells())
def test_law_3_every_trained_tensor_moves(cell: str, kind: str, trained: Any) -> None:
    made = trained(cell, kind)
    now = made.adapted.state()
    still = [name for name, tensor in made.start.items() if torch.equal(tensor, now[name])]
    # BERT's pooler and token types aside, nothing may stand still: what a batch never reads gets no gradient.
    unread = {name for name in still if "position_embeddings" in name or "token_type_embeddings" in name}
    assert set(still) == unread


CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import tiny, torch, adapters
for folder in json.loads(sys.stdin.read()):
    adapted = adapters.load(folder)
    torch.save(tiny.logits(adapted.model), folder + "/../logits.pt")
"""


def test_law_4_a_fresh_process_gives_the_same_logits(trained: Any) -> None:
    cells = [trained(cell, kind) for kind in KINDS for cell in fits(kind)]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(Path(__file__).parent)],
        input=json.dumps([str(cell.folder) for cell in cells]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    for cell in cells:
        there = torch.load(cell.folder.parent / "logits.pt", weights_only=True)
        assert torch.equal(there, cell.logits), cell.name


@pytest.mark.parametrize(("cell", "kind"), all_cells())
def test_law_5_merged_means_the_same(cell: str, kind: str, trained: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    made = trained(cell, kind)
    report = adapters.merge_on_disk(made.folder, tmp_path / "merged", check_logits=False)
    assert report.verified == report.edited
    on_disk, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    spread = float(made.logits.std())
    assert float((tiny.logits(on_disk) - made.logits).abs().max()) <= 1e-4 * max(spread, 1.0)
    assert [on_disk.config.id2label[i] for i in range(3)] == list(tiny.LABELS)
    again = adapters.load(made.folder)
    if cell in PACKED:
        with pytest.raises(adapters.RequestError, match="merge_on_disk"):
            adapters.merge(again)
        return
    merged = adapters.merge(again)
    assert merged is again.model
    assert float((tiny.logits(merged) - made.logits).abs().max()) <= 1e-4 * max(spread, 1.0)
    disk_state = on_disk.state_dict()
    assert all(torch.equal(tensor, disk_state[name]) for name, tensor in merged.state_dict().items())
    for action in (lambda: adapters.save(again, tmp_path / "again"), lambda: adapters.merge(again)):
        with pytest.raises(adapters.SpentError):
            action()


@pytest.mark.parametrize("kind", KINDS)
def test_law_5_logits_are_compared_in_a_child(kind: str, trained: Any, tmp_path: Path) -> None:
    report = adapters.merge_on_disk(trained("lora", kind).folder, tmp_path / "merged")
    assert report.logits_checked
    assert report.agreement == 1.0
    assert report.max_difference is not None
    assert report.spread is not None
    assert report.max_difference <= 1e-4 * report.spread


@pytest.mark.parametrize("kind", KINDS)
def test_law_6_one_other_tensor_is_another_backbone(
    kind: str, trained: Any, backbones: dict[str, str], tmp_path: Path
) -> None:
    from transformers import AutoModel

    made = trained("lora", kind)
    other = AutoModel.from_pretrained(backbones[kind])
    name, tensor = next(
        (n, p) for n, p in other.named_parameters() if p.dim() == 2 and "embed" not in n and "wte" not in n
    )
    with torch.no_grad():
        tensor[-1, -1] += 1e-3
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(adapters.BackboneError, match=name.rpartition(".")[0].rpartition(".")[2]):
        adapters.load(made.folder, str(tmp_path / "other"))
    with pytest.raises(adapters.BackboneError):
        adapters.merge_on_disk(made.folder, tmp_path / "merged", base=tmp_path / "other")
    assert not (tmp_path / "merged").exists()
    opened = adapters.load(made.folder, str(tmp_path / "other"), verify="off")
    assert set(opened.state()) == set(made.adapted.state())


@pytest.mark.parametrize("verify", ["strict", "fast"])
@pytest.mark.parametrize("kind", KINDS)
def test_law_6_the_right_backbone_in_every_form(
    kind: str, verify: str, trained: Any, backbones: dict[str, str], tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    made = trained("lora", kind)
    for dtype in ("float32", "bfloat16"):
        live = AutoModelForSequenceClassification.from_pretrained(backbones[kind], dtype=dtype, num_labels=3)
        opened = adapters.load(made.folder, live, verify=verify)
        assert opened.model is live
        assert set(opened.state()) == set(made.adapted.state())
    copied = tmp_path / "copy"
    AutoModelForSequenceClassification.from_pretrained(backbones[kind], num_labels=3).save_pretrained(copied)
    assert torch.equal(tiny.logits(adapters.load(made.folder, str(copied), verify=verify).model), made.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_law_6_a_packed_live_backbone(kind: str, trained: Any, backbones: dict[str, str]) -> None:
    from transformers import AutoModelForSequenceClassification

    made = trained("qlora", kind)
    live = AutoModelForSequenceClassification.from_pretrained(backbones[kind], num_labels=3)
    packed = adapters.adapt(live, "probe", quantization="nf4", labels=list(tiny.LABELS)).model
    opened = adapters.load(made.folder, packed)
    assert torch.equal(tiny.logits(opened.model), made.logits)
    live = AutoModelForSequenceClassification.from_pretrained(backbones[kind], num_labels=3)
    packed = adapters.adapt(live, "probe", quantization="nf4", labels=list(tiny.LABELS)).model
    weight = next(m.weight for m in packed.modules() if type(m).__name__ == "Linear4bit")
    weight.data[0] ^= 1
    with pytest.raises(adapters.BackboneError, match="packed weights"):
        adapters.load(made.folder, packed)


@pytest.mark.parametrize("kind", KINDS)
def test_law_7_one_adapter_at_weight_one_is_itself(kind: str, trained: Any) -> None:
    from adapters.edits import blend

    made = trained("lora", kind)
    edits = {n: e for n, e in made.adapted.strategy.edits(made.adapted.state()).items() if n not in made.adapted.head}
    base = {own_name(name): p.detach() for name, p in made.adapted.model.named_parameters()}
    for name, edit in blend([(1.0, edits)]).items():
        assert torch.equal(edit(base[name]), edits[name](base[name])), name
    halves = blend([(0.5, edits), (0.5, edits)])
    for name, edit in halves.items():
        assert torch.allclose(edit(base[name]), edits[name](base[name]), atol=1e-6), name


OWN = {"full", "freeze", "probe", "bitfit"}
PEFT_CELLS = [cell for cell, (name, _) in CELLS.items() if name not in OWN and cell not in PACKED]


@pytest.mark.parametrize(
    ("cell", "kind"),
    [
        pytest.param(cell, kind, id=f"{cell}-{kind}")
        for kind in tiny.KINDS
        for cell in PEFT_CELLS
        if (cell, kind) not in REFUSALS
    ],
)
def test_law_11_plain_peft_opens_our_folder(cell: str, kind: str, trained: Any, backbones: dict[str, str]) -> None:
    import peft
    from transformers import AutoModelForSequenceClassification

    made = trained(cell, kind)
    base = AutoModelForSequenceClassification.from_pretrained(backbones[kind], num_labels=3)
    base.config.pad_token_id = made.adapted.model.config.pad_token_id
    theirs = peft.PeftModel.from_pretrained(base, str(made.folder))
    assert torch.equal(tiny.logits(theirs), made.logits)


@pytest.mark.parametrize("options", [{}, {"r": 4, "oft_block_size": 0}])
def test_law_11_an_oft_adapter_whose_block_size_is_the_default_says_it(options: dict[str, int], tmp_path: Path) -> None:
    """peft refuses an OFT config without it: "OFT has been updated since PEFT 0.14.0 ..."."""
    import peft
    from transformers import AutoModelForSequenceClassification

    base = tiny.folder("bert", tmp_path / "base")
    made = adapters.adapt(base, "oft", labels=list(tiny.LABELS), target_modules=["query", "value"], **options)
    tiny.shake(made)
    folder = adapters.save(made, tmp_path / "adapter")
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    assert torch.equal(tiny.logits(peft.PeftModel.from_pretrained(plain, str(folder))), tiny.logits(made.model))
    assert torch.equal(tiny.logits(adapters.load(folder).model), tiny.logits(made.model))


@pytest.mark.parametrize("kind", KINDS)
def test_law_11_our_load_opens_pefts_folder(kind: str, tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=[TARGET[kind]], init_lora_weights=False)
    theirs = peft.get_peft_model(tiny.model(kind), config)
    wanted = tiny.logits(theirs)
    theirs.save_pretrained(tmp_path)
    opened = adapters.load(tmp_path, tiny.model(kind))
    assert torch.equal(tiny.logits(opened.model), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_backbones_keep_the_laws(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    tiny.backbone(kind).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    for cell in ("lora", "freeze", "probe"):
        adapted = adapt(cell, str(tmp_path / "base"))
        assert adapted.model.dtype == torch.bfloat16
        tiny.shake(adapted)
        wanted = tiny.logits(adapted.model).float()
        adapters.save(adapted, tmp_path / cell)
        assert torch.equal(tiny.logits(adapters.load(tmp_path / cell).model).float(), wanted)
        adapters.merge_on_disk(tmp_path / cell, tmp_path / f"{cell}-merged", check_logits=False)
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"{cell}-merged", dtype="auto")
        assert merged.dtype == torch.bfloat16
        spread = float(wanted.std())
        assert float((tiny.logits(merged).float() - wanted).abs().max()) <= 0.1 * max(spread, 0.1)
