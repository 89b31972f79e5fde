"""Many adapters on one live backbone: the same answers as one at a time, and the backbone as it was."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import adapters
from adapters import fingerprint
from adapters.prefix import Prefix
from adapters.rowwise import Below

BOUND = 1e-5  # of the logits' spread, fp32
TIGHT = 1e-12  # of it, float64
BY_ROWS = {  # what has a form by rows, by name: strategy and options
    "factors": ("lora", {"r": 3}),
    "magnitudes": ("dora", {"r": 2}),
    "magnitudes and biases": ("dora", {"r": 3, "bias": "lora_only"}),
    "outputs": ("ia3", {}),
    "inputs": ("ia3", {"feedforward_modules": ["output.dense"]}),
    "blocks": ("oft", {"oft_block_size": 8}),
    "small blocks": ("oft", {"oft_block_size": 4, "use_cayley_neumann": False}),
    "one block": ("oft", {"oft_block_size": 8, "block_share": True}),
    "reflections": ("hra", {"r": 4}),
    "entries": ("loha", {"r": 2}),
    "kronecker": ("lokr", {"r": 2, "decompose_factor": 4}),
    "factors of kronecker": ("lokr", {"r": 1, "decompose_both": True, "decompose_factor": 4}),
    "offsets": ("peft", {"config": {"peft_type": "LORA", "r": 2, "lora_bias": True, "target_modules": ["query"]}}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3},
    "freeze": {"layers": 1},
    "oft": {"oft_block_size": 8},
    "boft": {"boft_block_size": 4},
}
MIXABLE = ("lora", "rslora", "dora", "pissa", "bitfit", "freeze", "probe", "ia3", "oft", "loha", "lokr", "hra")
STRATEGIES = {
    "bert": (*MIXABLE, "full"),
    "gpt2": ("lora", "dora", "freeze", "bitfit", "ia3", "full"),
    "llama": ("lora", "rslora", "freeze", "probe", "oft", "dora", "hra", "full"),
    "vit": ("lora", "dora", "bitfit", "freeze", "ia3", "full"),
    "t5": ("lora", "rslora", "freeze", "loha", "ia3", "full"),
    "deberta-v2": ("lora", "bitfit"),
    "roberta": ("lora", "bitfit"),
    "swin": ("lora", "freeze"),
}


class Made:
    """A backbone in a folder, and adapters of it in others."""

    def __init__(self, root: Path, kind: str) -> None:
        self.root, self.kind = root, kind
        self.base = root / "base"
        tiny.folder(kind, self.base)

    def add(self, name: str, strategy: str, labels: Sequence[str] = tiny.LABELS, **options: Any) -> Path:
        task = "image-classification" if self.kind in tiny.IMAGES else "text-classification"
        given: dict[str, Any] = {"task": task, "labels": list(labels)} | OPTIONS.get(strategy, {}) | options
        if given["task"] in ("causal-lm", "seq2seq"):
            del given["labels"]
        adapted = adapters.adapt(str(self.base), strategy, **given)
        tiny.shake(adapted, seed=len(name) + sum(map(ord, name)))
        return adapters.save(adapted, self.root / name)

    def alone(self, name: str) -> Any:
        return adapters.load(self.root / name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    known: dict[str, Made] = {}

    def make(kind: str) -> Made:
        if kind not in known:
            known[kind] = Made(tmp_path_factory.mktemp(kind), kind)
            for strategy in STRATEGIES[kind]:
                known[kind].add(strategy, strategy)
        return known[kind]

    return make


@pytest.fixture
def trio(made: Callable[[str], Made]) -> tuple[adapters.Shared, Made]:
    """Three adapters of a BERT, loaded."""
    found = made("bert")
    shared = adapters.Shared(found.base)
    for name in ("lora", "bitfit", "freeze"):
        shared.load(found.root / name)
    return shared, found


def rows_of(kind: str, count: int) -> list[Any]:
    if kind not in tiny.IMAGES:
        return [row["text"] for row in tiny.rows(count)]
    from PIL import Image

    size = getattr(tiny.config(kind), "image_size", 32)
    noise = torch.randint(0, 255, (count, size, size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [Image.fromarray(each.numpy()) for each in noise]


def agree(found: Sequence[Any], wanted: Sequence[Any]) -> None:
    """Answers are the same but for rounding in the numbers."""
    assert len(found) == len(wanted)
    for one, two in zip(found, wanted, strict=True):
        assert type(one) is type(two)
        if isinstance(one, dict):
            assert list(one) == list(two)
            agree(list(one.values()), list(two.values()))
        elif isinstance(one, list):
            agree(one, two)
        else:
            assert one == (pytest.approx(two, rel=1e-4, abs=1e-5) if isinstance(one, float) else two)


# ---------------------------------------------------------------------- the law: as one at a time


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_mixed_batch_answers_as_each_adapter_alone(made: Callable[[str], Made], kind: str) -> None:
    found = made(kind)
    shared = adapters.Shared(found.base)
    for name in STRATEGIES[kind]:
        shared.load(found.root / name)
    rows = rows_of(kind, 3 * len(STRATEGIES[kind]))
    names = list(STRATEGIES[kind]) * 3
    answers = adapters.predict(shared, rows, adapter=names, batch_size=16)
    for name in STRATEGIES[kind]:
        mine = [place for place, own in enumerate(names) if own == name]
        agree([answers[place] for place in mine], adapters.predict(found.alone(name), [rows[place] for place in mine]))


def test_logits_that_no_pass_can_mix_are_refused(made: Callable[[str], Made]) -> None:
    """T5's position table is read once for all rows: with a length that the rows divide nothing else would tell."""
    found = made("t5")
    shared = adapters.Shared(found.base)
    for name in ("full", "lora"):
        shared.load(found.root / name)
    inputs = tiny.inputs(shared.use("lora").model, 3)
    assert inputs["input_ids"].shape[1] % 3 == 0
    with pytest.raises(adapters.RequestError, match=r"cannot share a pass.*full.*run"), shared.mixed(["full", "lora"]):
        pass
    with shared.mixed(["full"] * 3) as model:
        logits = model(**inputs).logits
    torch.testing.assert_close(logits, tiny.logits(found.alone("full").model, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "vit", "t5"])
def test_mixed_logits_are_those_of_each_adapter_alone(made: Callable[[str], Made], kind: str) -> None:
    found = made(kind)
    shared = adapters.Shared(found.base)
    names = [name for name in STRATEGIES[kind] if name != "full"] * 2
    for name in dict.fromkeys(names):
        shared.load(found.root / name)
    alone = {name: found.alone(name).model for name in dict.fromkeys(names)}
    inputs = tiny.inputs(alone[names[0]], len(names))
    with shared.mixed(names) as model:
        logits = model(**inputs).logits
    spread = float(logits.std())
    for row, name in enumerate(names):
        own = tiny.logits(alone[name], {key: value[row : row + 1] for key, value in inputs.items()})
        assert float((own[0] - logits[row]).abs().max()) <= BOUND * spread, name
        view = tiny.logits(shared.use(name).model, {key: value[row : row + 1] for key, value in inputs.items()})
        assert float((own - view).abs().max()) <= BOUND * spread, name


# ---------------------------------------------------------------------- forms by rows


@pytest.fixture(scope="module")
def formed(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Adapters of a BERT of which none needs a weight of its own."""
    found = Made(tmp_path_factory.mktemp("formed"), "bert")
    for name, (strategy, options) in BY_ROWS.items():
        found.add(name, strategy, **options)
    return found


def double(found: Made, name: str) -> Any:
    """One adapter by itself as peft computes it, all of it in float64."""
    import transformers

    auto: Any = transformers.AutoModelForSequenceClassification
    live = auto.from_pretrained(found.base, num_labels=3, dtype=torch.float64)
    return adapters.load(found.root / name, live).model.double()


@pytest.mark.parametrize(("dtype", "bound"), [("float64", TIGHT), ("float32", BOUND)])
def test_rows_by_form_answer_as_peft_does(formed: Made, dtype: str, bound: float) -> None:
    """All methods in one batch, LoRA among them, in an order that tears each one's rows apart."""
    shared = adapters.Shared(formed.base, load={"dtype": dtype})
    names = [*BY_ROWS, *reversed(BY_ROWS)]
    for name in BY_ROWS:
        shared.load(formed.root / name)
        assert not shared._residents[name].merged
        changes = (shared._residents[name].held or {}).items()
        assert [path for path, change in changes if "weight" in change.whole] == ["classifier"]
    alone = {name: double(formed, name) if dtype == "float64" else formed.alone(name).model for name in BY_ROWS}
    inputs = tiny.inputs(alone["factors"], len(names))
    with shared.mixed(names) as model:
        logits = model(**inputs).logits
        again = model(**inputs).logits  # what is gathered is kept from now on
        kept = model(**inputs).logits
    assert torch.equal(logits, again)
    assert torch.equal(logits, kept)
    assert str(logits.dtype) == f"torch.{dtype}"
    spread = float(logits.std())
    for row, name in enumerate(names):
        own = tiny.logits(alone[name], {key: value[row : row + 1] for key, value in inputs.items()})
        assert float((own[0] - logits[row]).abs().max()) <= bound * spread, name
    for name in BY_ROWS:  # one adapter in all rows, and by itself
        own = tiny.logits(alone[name], inputs)
        with shared.mixed([name] * len(names)) as model:
            assert float((own - model(**inputs).logits).abs().max()) <= bound * spread, name
        assert float((own - tiny.logits(shared.use(name).model, inputs)).abs().max()) <= bound * spread, name


def file_bytes(found: Made, name: str, *parts: str) -> int:
    """Bytes of those tensors of an adapter's file whose names have one of these parts."""
    from adapters import shards

    slots, _ = shards.read_header(found.root / name / "adapter_model.safetensors")
    return sum(slot.nbytes for key, slot in slots.items() if any(part in key for part in parts))


def kronecker_bytes(found: Made, name: str) -> int:
    """Bytes of the matrices of LoKr's products, by the shapes in an adapter's file."""
    from adapters import shards

    slots, _ = shards.read_header(found.root / name / "adapter_model.safetensors")
    shapes = {key: slot.shape for key, slot in slots.items() if "lokr" in key}
    whole = [shape for key, shape in shapes.items() if not key.endswith(("_a", "_b"))]
    whole += [(shape[0], shapes[f"{key[:-2]}_b"][1]) for key, shape in shapes.items() if key.endswith("_a")]
    return sum(4 * rows * columns for rows, columns in whole)


@pytest.mark.parametrize("name", BY_ROWS)
def test_an_adapter_with_a_form_takes_its_own_size_in_memory(formed: Made, name: str) -> None:
    """Counted against its file: what is more is a vector a layer (DoRA's shift), or a block beside its upper half."""
    shared = adapters.Shared(formed.base)
    shared.load(formed.root / name)
    held = shared._residents[name].held or {}
    head = file_bytes(formed, name, "classifier")
    taken = shared.nbytes - head
    maps = {path: change for path, change in held.items() if change.by_rows}
    outputs = {path: shared._residents[name].trunk.net.get_submodule(path).weight.shape[0] for path in maps}
    small = 4 * sum(outputs.values())  # one float32 an output
    strategy, options = BY_ROWS[name]
    if strategy == "dora":  # the magnitude has become a gain; the shift takes the place of a trained bias
        assert taken == file_bytes(formed, name, "lora_A", "lora_B", "magnitude") + small
    elif strategy == "oft":
        size = options["oft_block_size"]
        upper = file_bytes(formed, name, "oft_R")
        assert taken == upper * 2 * size // (size - 1)  # size^2 entries for size (size - 1) / 2
    elif strategy == "hra":
        assert taken == 2 * file_bytes(formed, name, "hra_u")
    elif strategy == "loha":  # rank r^2 for two times r
        assert taken == options["r"] * file_bytes(formed, name, "hada_w1")
    elif strategy == "lokr":  # both matrices, of which the file may hold factors
        assert taken == kronecker_bytes(formed, name)
    else:
        assert taken == file_bytes(formed, name, "lora_A", "lora_B", "ia3_l")
    net: Any = shared._residents[name].trunk.net
    assert taken < sum(net.get_submodule(path).weight.nbytes for path in maps)


def test_a_method_without_a_form_is_held_whole_and_says_so(
    made: Callable[[str], Made], caplog: pytest.LogCaptureFixture
) -> None:
    found = made("bert")
    shared = adapters.Shared(found.base)
    with caplog.at_level(logging.WARNING):
        for name in ("dora", "ia3", "oft", "hra", "lokr", "freeze", "bitfit"):
            shared.load(found.root / name)
        assert not [record for record in caplog.records if "whole" in record.message]
        shared.load(found.root / "loha")
    said = [record.message for record in caplog.records if "whole" in record.message]
    assert len(said) == 1
    assert said[0].startswith("loha holds 18 weights whole, 0.")
    weights = sum(
        module.weight.nbytes
        for path, module in shared._residents["loha"].trunk.net.named_modules()
        if path in shared._residents["loha"].merged
    )
    assert shared._residents["loha"].nbytes > weights > 0


def test_forms_in_generation_with_beams(tmp_path: Path) -> None:
    found = Made.__new__(Made)
    found.root, found.kind, found.base = tmp_path, "t5", tmp_path / "base"
    tiny.folder("t5", found.base, auto="AutoModelForSeq2SeqLM")
    strategies = {"one": "dora", "two": "oft", "three": "ia3", "four": "hra", "five": "lora"}
    for name, strategy in strategies.items():
        found.add(name, strategy, task="seq2seq", max_new_tokens=6, num_beams=3)
    shared = adapters.Shared(found.base)
    for name in strategies:
        shared.load(found.root / name)
    rows, names = [row["text"] for row in tiny.rows(10)], list(strategies) * 2
    answers = adapters.predict(shared, rows, adapter=names)
    for place, name in enumerate(names):
        agree([answers[place]], adapters.predict(found.alone(name), [rows[place]]))


def test_the_backbone_is_as_it_was(made: Callable[[str], Made]) -> None:
    found = made("bert")
    shared = adapters.Shared(found.base)
    shared.load(found.root / "probe")
    trunk = shared._residents["probe"].trunk
    head = frozenset(trunk.head)
    before = fingerprint.of_model(trunk.net, head)
    assert not fingerprint.differences(fingerprint.of_folder(trunk.net, head, found.base), before)
    for name in MIXABLE:
        shared.load(found.root / name, name=f"{name} again")
    adapters.predict(shared, rows_of("bert", 24), adapter=[f"{name} again" for name in MIXABLE] * 2)
    adapters.evaluate(shared.use("full" if "full" in shared.names else "lora again"), tiny.rows(6))
    for name in shared.names:
        shared.unload(name)
    for net in (trunk.net, trunk.mixed):
        assert fingerprint.of_model(net, head).digest == before.digest
        assert not any("forward" in vars(module) for module in net.modules())
    assert shared.names == ()
    assert shared.nbytes == 0


def test_tensors_are_shared_between_model_classes(tmp_path: Path) -> None:
    found = Made(tmp_path, "bert")
    found.add("texts", "lora")
    found.add("tags", "lora", task="token-classification", labels=["O", "B-x", "I-x"])
    shared = adapters.Shared(found.base)
    shared.load(found.root / "texts")
    shared.load(found.root / "tags")
    one, two = (shared._residents[name].trunk for name in ("texts", "tags"))
    assert one is not two
    mine, theirs = dict(one.net.named_parameters()), dict(two.net.named_parameters())
    for name in set(mine) & set(theirs) - one.head - two.head:
        assert mine[name].data_ptr() == theirs[name].data_ptr(), name


# ---------------------------------------------------------------------- tasks, heads, generation


def test_heads_of_different_sizes_and_other_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Made(tmp_path, "bert")
    found.add("two", "lora", labels=["no", "yes"])
    found.add("three", "freeze", layers=1)
    found.add("five", "probe", labels=["p", "q", "r", "s", "t"])
    found.add("tags", "lora", task="token-classification", labels=["O", "B-x", "I-x"])
    found.add("number", "lora", labels=[], problem="regression")
    shared = adapters.Shared(found.base)
    names = ["two", "three", "five", "tags", "number"]
    for name in names:
        shared.load(found.root / name)
    rows = rows_of("bert", 15)
    blocks = []
    whole = Below.whole_states
    monkeypatch.setattr(Below, "whole_states", lambda self, given: blocks.append(len(given)) or whole(self, given))
    answers = adapters.predict(shared, rows, adapter=names * 3)
    assert len(blocks) == 1  # all classifiers' rows in one pass of the blocks
    for place, name in enumerate(names * 3):
        agree([answers[place]], adapters.predict(found.alone(name), [rows[place]]))
    with (
        pytest.raises(adapters.RequestError, match="different models or heads cannot give logits together"),
        shared.mixed(["two", "three"]),
    ):
        pass


@pytest.mark.parametrize(("kind", "task"), [("llama", "causal-lm"), ("gpt2", "causal-lm"), ("t5", "seq2seq")])
def test_generation_with_mixed_adapters(tmp_path: Path, kind: str, task: str) -> None:
    root = tmp_path
    found = Made.__new__(Made)
    found.root, found.kind, found.base = root, kind, root / "base"
    auto = "AutoModelForCausalLM" if task == "causal-lm" else "AutoModelForSeq2SeqLM"
    tiny.folder(kind, found.base, auto=auto)
    beams = {"num_beams": 3} if task == "seq2seq" else {}
    for name, strategy in (("one", "lora"), ("two", "rslora"), ("three", "freeze")):
        found.add(name, strategy, task=task, max_new_tokens=6, **beams)
    shared = adapters.Shared(found.base)
    names = ["one", "two", "three"]
    for name in names:
        shared.load(root / name)
    rows = [row["text"] for row in tiny.rows(9)]
    column = "text" if task == "causal-lm" else "source"
    given = [{column: row} for row in rows] if task == "causal-lm" else rows
    answers = adapters.predict(shared, given, adapter=names * 3)
    assert not any(shared._residents[name].apart for name in names)
    for place, name in enumerate(names * 3):
        agree([answers[place]], adapters.predict(found.alone(name), [given[place]]))


def test_use_evaluates_as_the_loaded_adapter(trio: tuple[adapters.Shared, Made]) -> None:
    shared, found = trio
    for name in shared.names:
        numbers = adapters.evaluate(shared.use(name), tiny.rows(12))
        assert numbers == pytest.approx(adapters.evaluate(found.alone(name), tiny.rows(12)), rel=1e-4)
    assert shared.use("lora") is shared.use("lora")


# ---------------------------------------------------------------------- what is frozen below is computed once


def test_the_same_rows_under_many_adapters_pass_the_frozen_blocks_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Made(tmp_path, "bert")
    names = ["p", "q", "r"]
    found.add("p", "probe")
    found.add("q", "freeze", layers=1)
    found.add("r", "lora", layers_to_transform=[2])
    shared = adapters.Shared(found.base)
    for name in names:
        shared.load(found.root / name)
    passed = []
    run = Prefix.run

    def counted(self: Prefix, inputs: Any) -> Any:
        passed.append(len(inputs["input_ids"]))
        return run(self, inputs)

    rows = rows_of("bert", 7)
    monkeypatch.setattr(Prefix, "run", counted)
    answers = adapters.predict(shared, rows * 3, adapter=[name for name in names for _ in rows], batch_size=5)
    tried = 2  # rows on which the cut is tried first
    assert sum(passed) == len(rows) + tried
    for place, name in enumerate(names):
        alone = adapters.predict(found.alone(name), rows)
        agree(answers[place * len(rows) : (place + 1) * len(rows)], alone)


def test_rows_that_cannot_mix_run_apart_and_it_is_said_once(
    made: Callable[[str], Made], caplog: pytest.LogCaptureFixture
) -> None:
    found = made("bert")
    shared = adapters.Shared(found.base)
    for name in ("lora", "full"):
        shared.load(found.root / name)
    rows = rows_of("bert", 4)
    with caplog.at_level(logging.WARNING):
        first = adapters.predict(shared, rows, adapter=["lora", "full"] * 2)
        assert first == adapters.predict(shared, rows, adapter=["lora", "full"] * 2)
    assert [record.message for record in caplog.records if "run apart" in record.message] == [
        "rows of full run apart from those of other adapters: a pass of BertForSequenceClassification uses a tensor "
        "that they change for all rows at once"
    ]


# ---------------------------------------------------------------------- memory


def test_what_was_used_longest_ago_waits_on_disk(made: Callable[[str], Made]) -> None:
    found = made("bert")
    free = adapters.Shared(found.base)
    sizes = {}
    for name in ("lora", "rslora", "bitfit", "probe"):
        before = free.nbytes
        free.load(found.root / name)
        sizes[name] = free.nbytes - before
    room = sizes["lora"] + sizes["rslora"] + sizes["bitfit"] - 1
    shared = adapters.Shared(found.base, memory=f"{room / 1000} kB")
    for name in sizes:
        shared.load(found.root / name)
        assert shared.nbytes <= room
    assert shared.names == ("bitfit", "lora", "probe", "rslora")
    assert "lora" not in shared.resident
    rows = rows_of("bert", 12)
    names = list(sizes) * 3
    answers = adapters.predict(shared, rows, adapter=names)
    assert shared.nbytes <= room
    assert shared._residents.reads >= 1
    agree(answers, adapters.predict(free, rows, adapter=names))
    shared.unload("lora")
    assert "lora" not in shared.names


def test_an_adapter_that_changed_on_disk_does_not_come_back(tmp_path: Path) -> None:
    found = Made(tmp_path, "bert")
    for name in ("one", "two"):
        found.add(name, "lora")
    size = adapters.Shared(found.base)
    size.load(found.root / "one")
    shared = adapters.Shared(found.base, memory=f"{size.nbytes / 1000} kB")
    shared.load(found.root / "one")
    shared.load(found.root / "two")
    shutil.copy(found.root / "two" / "adapter_model.safetensors", found.root / "one" / "adapter_model.safetensors")
    with pytest.raises(adapters.FolderError, match="weights have changed since it was loaded"):
        adapters.predict(shared, ["my parcel"], adapter="one")
    adapters.predict(shared, ["my parcel"], adapter="two")
    shared.unload("one")


# ---------------------------------------------------------------------- live models


def test_a_live_model_and_an_adapted_one_lend_their_backbone(made: Callable[[str], Made]) -> None:
    import transformers

    found = made("bert")
    adapted = found.alone("rslora")
    live: Any = transformers.AutoModelForSequenceClassification.from_pretrained(found.base, num_labels=3)
    rows = rows_of("bert", 6)
    wanted = [*adapters.predict(found.alone("lora"), rows[:3]), *adapters.predict(found.alone("bitfit"), rows[3:])]
    for given in (live, adapted):
        state = {name: tensor.clone() for name, tensor in given_model(given).state_dict().items()}
        shared = adapters.Shared(given)
        for name in ("lora", "bitfit"):
            shared.load(found.root / name)
        agree(adapters.predict(shared, rows, adapter=["lora"] * 3 + ["bitfit"] * 3), wanted)
        assert all(torch.equal(tensor, state[name]) for name, tensor in given_model(given).state_dict().items())


def given_model(given: Any) -> Any:
    return given.model if isinstance(given, adapters.Adapted) else given


def test_packed_backbones(tmp_path: Path) -> None:
    found = Made(tmp_path, "bert")
    found.add("one", "qlora", r=3)
    found.add("two", "qlora", r=2)
    found.add("three", "dora", quantization="nf4")
    found.add("four", "ia3", quantization="nf4")
    found.add("five", "oft", quantization="nf4")
    shared = adapters.Shared(found.base)
    names = ["one", "two", "three", "four", "five"]
    for name in names:
        shared.load(found.root / name)
    assert not any(shared._residents[name].merged for name in names)
    rows = rows_of("bert", 10)
    answers = adapters.predict(shared, rows, adapter=names * 2)
    for place, name in enumerate(names * 2):
        agree([answers[place]], adapters.predict(found.alone(name), [rows[place]]))


def test_unfrozen_parameters_biases_and_added_tokens(tmp_path: Path) -> None:
    found = Made(tmp_path, "bert")
    found.add("norms", "lora", unfrozen_parameters=["LayerNorm"], bias="lora_only")
    found.add("ranks", "lora", r=2, rank_pattern={"query": 5}, alpha_pattern={"value": 3})
    found.add("tokens", "lora", added_tokens=["<new>"])
    found.add("mean", "probe", pooling="mean", layer=2)
    shared = adapters.Shared(found.base)
    names = ["norms", "ranks", "tokens", "mean"]
    for name in names:
        shared.load(found.root / name)
    rows = [f"{row} <new>" for row in rows_of("bert", 8)]
    answers = adapters.predict(shared, rows, adapter=names * 2)
    for place, name in enumerate(names * 2):
        agree([answers[place]], adapters.predict(found.alone(name), [rows[place]]))


# ---------------------------------------------------------------------- refused


def test_another_backbone_is_refused(trio: tuple[adapters.Shared, Made], tmp_path: Path) -> None:
    shared, _ = trio
    tiny.folder("bert", tmp_path / "base", seed=9)
    other = Made.__new__(Made)
    other.root, other.kind, other.base = tmp_path, "bert", tmp_path / "base"
    other.add("foreign", "lora")
    with pytest.raises(adapters.BackboneError, match="not the backbone that the adapter was trained on"):
        shared.load(tmp_path / "foreign")
    with pytest.raises(adapters.BackboneError, match="not the backbone that the adapter was trained on"):
        adapters.Shared(trio[1].base).load(tmp_path / "foreign")
    tiny.folder("llama", tmp_path / "llama", auto="AutoModelForCausalLM")
    adapted = adapters.adapt(str(tmp_path / "llama"), "lora", task="causal-lm")
    adapters.save(adapted, tmp_path / "chat")
    with pytest.raises(adapters.BackboneError, match=r"not the backbone.*chat.*of type llama; found .*of type bert"):
        shared.load(tmp_path / "chat")
    with pytest.raises(adapters.BackboneError, match=r"not the backbone.*of type llama; found .*base, of type bert"):
        adapters.load(tmp_path / "chat", str(tmp_path / "base"))
    assert shared.names == ("bitfit", "freeze", "lora")


def test_a_name_that_is_taken(trio: tuple[adapters.Shared, Made]) -> None:
    shared, found = trio
    with pytest.raises(adapters.RequestError, match=r"the name is taken.*unload\('lora'\) first"):
        shared.load(found.root / "lora")
    assert shared.load(found.root / "lora", name="other") == "other"
    with pytest.raises(adapters.RequestError, match="no name"):
        shared.load(found.root / "lora", name="")


def test_an_unknown_name(trio: tuple[adapters.Shared, Made]) -> None:
    shared, _ = trio
    for act in (
        lambda: shared.use("lara"),
        lambda: shared.unload("lara"),
        lambda: adapters.predict(shared, ["a parcel"], adapter=["lara"]),
    ):
        with pytest.raises(adapters.RequestError, match=r"unknown adapter 'lara'.*Did you mean 'lora'"):
            act()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adapter": ["lora"]}, "not one adapter a row.*expected 2 names; found 1"),
        ({}, "which adapter each row takes is not said"),
        ({"adapter": "lora", "device": "cpu"}, "stays where it is"),
        ({"adapter": "lora", "batch_size": 0}, "wrong value"),
    ],
)
def test_requests_that_cannot_be(trio: tuple[adapters.Shared, Made], options: dict[str, Any], said: str) -> None:
    with pytest.raises(adapters.RequestError, match=said):
        adapters.predict(trio[0], ["a parcel", "my money"], **options)


def test_one_adapter_has_nothing_to_choose(trio: tuple[adapters.Shared, Made]) -> None:
    with pytest.raises(adapters.RequestError, match="one adapter, and nothing to choose"):
        adapters.predict(trio[1].alone("lora"), ["a parcel"], adapter=["lora"])


def test_bad_rows_are_named(trio: tuple[adapters.Shared, Made]) -> None:
    with pytest.raises(adapters.DataError, match="row 1"):
        adapters.predict(trio[0], ["a parcel", 7], adapter="lora")
    with pytest.raises(adapters.RequestError, match="one adapter is evaluated at a time"):
        adapters.evaluate(trio[0], tiny.rows(6))  # type: ignore[arg-type]


def test_bad_rows_of_some_adapters_are_counted_among_theirs(tmp_path: Path) -> None:
    found = Made(tmp_path, "bert")
    found.add("texts", "lora")
    found.add("tags", "probe", task="token-classification", labels=["O", "B-x"])
    shared = adapters.Shared(found.base)
    for name in ("texts", "tags"):
        shared.load(found.root / name)
    with pytest.raises(adapters.DataError, match=r"row 0.*Counted are the 1 rows of texts\."):
        adapters.predict(shared, ["a parcel", 7], adapter=["tags", "texts"])


def test_a_backbone_in_bfloat16(made: Callable[[str], Made]) -> None:
    import transformers

    found = made("llama")
    shared = adapters.Shared(found.base, load={"dtype": "bfloat16"})
    names = ["lora", "rslora", "freeze", "dora", "oft", "hra"]
    alone = {}
    for name in names:
        shared.load(found.root / name)
        auto: Any = transformers.AutoModelForSequenceClassification
        live = auto.from_pretrained(found.base, num_labels=3, dtype=torch.bfloat16)
        alone[name] = adapters.load(found.root / name, live).model
    inputs = tiny.inputs(alone["lora"], 12)
    with shared.mixed(names * 2) as model:
        logits = model(**inputs).logits
    for row, name in enumerate(names * 2):
        own = tiny.logits(alone[name], {key: value[row : row + 1] for key, value in inputs.items()})
        assert float((own[0] - logits[row]).abs().max()) <= 3e-2 * float(logits.float().std())


def test_a_shared_adapter_is_only_read(trio: tuple[adapters.Shared, Made], tmp_path: Path) -> None:
    shared, _ = trio
    used = shared.use("lora")
    for act in (
        lambda: adapters.save(used, tmp_path / "out"),
        lambda: adapters.merge(used),
        lambda: adapters.Trainer(used, train_dataset=tiny.rows(6)),
    ):
        with pytest.raises(adapters.RequestError, match="an adapter on a shared backbone can only be read"):
            act()
    assert not (tmp_path / "out").exists()


def test_what_was_unloaded_answers_no_more(trio: tuple[adapters.Shared, Made]) -> None:
    shared, _ = trio
    used = shared.use("lora")
    shared.unload("lora")
    with pytest.raises(adapters.RequestError, match="this adapter was unloaded"):
        adapters.predict(used, ["a parcel"])


def test_backbones_that_cannot_be_shared(made: Callable[[str], Made]) -> None:
    found = made("bert")
    merged = found.alone("lora")
    adapters.merge(merged)
    with pytest.raises(adapters.SpentError, match="merged into its model"):
        adapters.Shared(merged)
    with pytest.raises(adapters.RequestError, match="training mode"):
        adapters.Shared(tiny.model("bert").train())
    with pytest.raises(adapters.RequestError, match="carries an adapter already"):
        adapters.Shared(found.alone("lora").model)
    with pytest.raises(adapters.BackboneError, match="own tensors were trained"):
        adapters.Shared(found.alone("freeze"))
    with pytest.raises(adapters.RequestError, match="not a model"):
        adapters.Shared(7)  # type: ignore[arg-type]
    with pytest.raises(adapters.RequestError, match="unknown verify"):
        adapters.Shared(found.base, verify="loose")


def test_an_adapter_larger_than_memory(made: Callable[[str], Made]) -> None:
    found = made("bert")
    shared = adapters.Shared(found.base, memory="1 kB")
    with pytest.raises(adapters.RequestError, match="one adapter is larger than all may be"):
        shared.load(found.root / "lora")
    assert shared.names == ()
    with pytest.raises(adapters.RequestError):
        adapters.Shared(found.base, memory="much")


def test_a_damaged_folder(made: Callable[[str], Made], tmp_path: Path) -> None:
    found = made("bert")
    shutil.copytree(found.root / "lora", tmp_path / "lora")
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(bytes(raw))
    with pytest.raises(adapters.FolderError, match="a file was changed"):
        adapters.Shared(found.base).load(tmp_path / "lora")


def test_a_merged_backbone_is_another_one(made: Callable[[str], Made], tmp_path: Path) -> None:
    found = made("bert")
    adapters.merge_on_disk(found.root / "lora", tmp_path / "merged")
    with pytest.raises(adapters.BackboneError, match="merged into this backbone already"):
        adapters.Shared(tmp_path / "merged").load(found.root / "lora")
    with pytest.raises(adapters.BackboneError, match="not the backbone"):
        adapters.Shared(tmp_path / "merged").load(found.root / "rslora")
