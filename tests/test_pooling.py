"""A head that reads another pooling, or a lower block: in the live model, trained, saved, loaded, and taken out."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import adapters
from adapters import fidelity, manifest, pooling, prefix, relocation, shards
from adapters.anatomy import block_lists
from adapters.errors import ContractError, FolderError, RequestError
from adapters.handing import hidden_in
from adapters.reading import Reading

QUIET = {"disable_tqdm": True, "report_to": "none", "logging_steps": 1, "learning_rate": 5e-3, "num_train_epochs": 2}
POOLED = tuple(kind for kind in tiny.FAMILIES if kind not in ("t5", "bart", "marian", "dinov2", "resnet", "swin"))
CUT = tuple(kind for kind in tiny.FAMILIES if kind not in ("albert", "bart", "marian"))
LABELS = {"labels": list(tiny.LABELS)}


def auto_of(kind: str) -> str:
    """The head whose model has one stack of blocks: T5's sequence classifier has a decoder too."""
    return "AutoModelForTokenClassification" if kind == "t5" else tiny.heads(kind)[0]


def states_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The base model's last hidden state in a pass through the whole model."""
    caught: list[torch.Tensor] = []
    hook = model.base_model.register_forward_hook(lambda _m, _i, output: caught.append(hidden_in(output)))
    tiny.logits(model, inputs)
    hook.remove()
    return caught[0]


def bare(model: nn.Module) -> bool:
    """Whether no hook and no forward of its own is left anywhere."""
    return not any(
        "forward" in vars(m)
        or m._forward_hooks
        or m._forward_pre_hooks
        or m._forward_hooks_with_kwargs
        or m._forward_hooks_always_called
        for m in model.modules()
    )


@pytest.mark.parametrize("how", ["first", "mean", "last"])
@pytest.mark.parametrize("kind", POOLED)
def test_the_output_layer_reads_the_pooled_last_hidden_state(kind: str, how: str) -> None:
    """By hand row by row, padding on the right and on the left; afterwards no trace."""
    model = tiny.model(kind)
    before, names, kinds = (
        tiny.logits(model, tiny.inputs(model)),
        list(model.state_dict()),
        list(map(type, model.modules())),
    )
    found = pooling.place(model, how)
    assert pooling.placed(model) == Reading(how)
    assert list(model.state_dict()) == names
    assert list(map(type, model.modules())) == kinds
    layer: Any = model.get_submodule(found.output)
    inputs = tiny.inputs(model)
    for batch in (inputs, mirrored(inputs)):
        states, mask = states_of(model, batch), batch.get("attention_mask")
        for row, answer in enumerate(tiny.logits(model, batch)):
            own = states[row] if mask is None else states[row][mask[row].bool()]
            by_hand = {"first": own[0], "mean": own.mean(0), "last": own[-1]}[how]
            weight, bias = layer.weight, layer.bias
            torch.testing.assert_close(answer, nn.functional.linear(by_hand, weight, bias), rtol=1e-4, atol=1e-5)
    pooling.strip(model)
    assert bare(model)
    assert torch.equal(tiny.logits(model, tiny.inputs(model)), before)


def mirrored(inputs: dict[str, Any]) -> dict[str, Any]:
    """The rows with their padding on the left."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return inputs
    turned = {name: value.clone() for name, value in inputs.items()}
    for row, length in enumerate(mask.sum(1).tolist()):
        for name in turned:
            turned[name][row] = inputs[name][row].roll(mask.shape[1] - length)
    return turned


@pytest.mark.parametrize("kind", CUT)
def test_blocks_above_the_layer_compute_nothing(kind: str) -> None:
    """The states of the layer come out of the top block, and no linear map above it runs."""
    model = tiny.model(kind, auto=auto_of(kind))
    names = block_lists(model)[0].names()
    layer = len(names) - 1
    inputs = tiny.inputs(model)
    caught: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda _m, _i, output, path=path: caught.update({path: hidden_in(output)})
        )
        for path in names
    ]
    digest = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = tiny.logits(model, inputs)
    wanted = caught[names[layer - 1]]
    fits = wanted.shape == caught[names[-1]].shape
    if not fits:  # the stages of a pyramid differ in width
        with pytest.raises(RequestError, match="cannot read"):
            pooling.place(model, None, layer)
        assert torch.equal(tiny.logits(model, inputs), before)
        return
    pooling.place(model, None, layer)
    assert block_lists(model)[0].length == layer
    assert pooling.placed(model) == Reading("own", layer)
    worked = []
    hooks += [
        module.register_forward_hook(lambda _m, _i, _o, path=path: worked.append(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | nn.Conv2d) and path.startswith(f"{names[-1]}.")
    ]
    after = tiny.logits(model, inputs)
    assert not worked
    assert torch.equal(caught[names[-1]], wanted)
    assert not torch.equal(after, before)
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(tensor, digest[name]) for name, tensor in model.state_dict().items())
    pooling.strip(model)
    assert bare(model)
    assert torch.equal(tiny.logits(model, inputs), before)


@pytest.mark.parametrize(
    ("kind", "how", "layer", "said"),
    [
        ("albert", None, 2, "share one set of weights"),
        ("bart", "mean", None, "encoder-decoder"),
        ("t5", None, 2, "encoder-decoder"),
        ("dinov2", "mean", None, "reads 64 numbers, a hidden state has 32"),
        ("resnet", "mean", None, "no one linear layer"),
        ("bert", None, 4, "expected 1 to 3"),
        ("bert", "mean", 0, "expected 1 to 3"),
    ],
)
def test_what_cannot_be_read_is_refused_and_left_alone(kind: str, how: str | None, layer: Any, said: str) -> None:
    model = tiny.model(kind)
    before = tiny.logits(model, tiny.inputs(model))
    with pytest.raises(RequestError, match=said):
        pooling.place(model, how, layer)
    assert bare(model)
    assert torch.equal(tiny.logits(model, tiny.inputs(model)), before)


def test_two_heads_in_one_model_are_refused_because_the_numbers_differ() -> None:
    """DeiT with a teacher answers with the mean of two output layers: reading one of them elsewhere is not the rest."""
    import transformers

    model = transformers.DeiTForImageClassificationWithTeacher(tiny.config("deit", num_labels=3))
    with pytest.raises(RequestError, match="logits differ"):
        pooling.place(model, "mean")
    assert bare(model)


def test_a_placed_model_lives_on_as_any_model(tmp_path: Path) -> None:
    """Copies, pickles, train and eval, checkpointing of activations, an exception midway, threads, saving."""
    model = tiny.model("bert")
    pooling.place(model, "mean", 2)
    inputs = tiny.inputs(model)
    wanted = tiny.logits(model, inputs)
    again = copy.deepcopy(model)
    with torch.no_grad():
        again.classifier.weight.add_(1)
    assert torch.equal(tiny.logits(model, inputs), wanted)
    moved = tiny.logits(again, inputs)
    assert not torch.equal(moved, wanted)
    own = nn.functional.linear(
        pooling.pooled(states_of(again, inputs), inputs["attention_mask"], "mean"),
        again.classifier.weight,
        again.classifier.bias,
    )
    assert torch.equal(moved, own)
    assert torch.equal(tiny.logits(pickle.loads(pickle.dumps(model)), inputs), wanted)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model(**inputs).logits.sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached
    assert not any("pooler" in name or "layer.2." in name for name in reached)
    model.gradient_checkpointing_disable()
    reader = next(hook.__self__ for hook in model.base_model._forward_hooks.values())
    with pytest.raises(ValueError, match="batch_size"):
        model(**inputs, labels=torch.zeros(1, dtype=torch.long))  # five rows, one label
    assert reader._given == {}
    results: dict[int, torch.Tensor] = {}
    parts = [{name: value[row : row + 1] for name, value in inputs.items()} for row in range(5)]
    threads = [
        threading.Thread(target=lambda row=row: results.update({row: tiny.logits(model, parts[row])}))
        for row in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat([results[row] for row in range(5)]), wanted)
    assert torch.equal(model(**inputs, return_dict=False)[0], wanted)
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    assert bare(plain)
    assert list(plain.state_dict()) == list(model.state_dict())


def test_a_placed_bert_exports() -> None:
    """torch.export takes the hooks in; rows of another length too."""
    model = tiny.model("bert").eval()
    pooling.place(model, "mean", 2)
    inputs = tiny.inputs(model)
    size = {0: torch.export.Dim("rows", min=1, max=64), 1: torch.export.Dim("places", min=2, max=40)}
    program = torch.export.export(model, (), kwargs=inputs, dynamic_shapes=dict.fromkeys(inputs, size), strict=False)
    other = tiny.batch(3, 7, seed=2)
    torch.testing.assert_close(program.module()(**other).logits, tiny.logits(model, other))


# ---------------------------------------------------------------------- adapted, trained, saved, loaded


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("backbones")
    return {kind: tiny.folder(kind, place / kind) for kind in ("bert", "roberta", "distilbert", "gpt2", "llama", "vit")}


def adapted_on(folder: str, strategy: str, how: str | None, layer: int | None, **options: Any) -> Any:
    task = "image-classification" if folder.endswith("vit") else "text-classification"
    return adapters.adapt(folder, strategy, task=task, **LABELS, pooling=how, layer=layer, **options)


@pytest.mark.parametrize(
    ("kind", "strategy", "how", "layer"),
    [
        ("bert", "probe", "mean", 2),
        ("bert", "full", "first", 1),
        ("bert", "bitfit", None, 2),
        ("roberta", "lora", "mean", None),
        ("roberta", "freeze", "last", 2),
        ("distilbert", "probe", "mean", 1),
        ("distilbert", "lora", None, 2),
        ("gpt2", "lora", "mean", 2),
        ("gpt2", "full", None, 2),
        ("llama", "dora", "first", None),
        ("vit", "ia3", "mean", 2),
        ("vit", "probe", "first", None),
    ],
)
def test_saved_and_loaded_it_answers_the_same_bit_for_bit(
    folders: dict[str, str], tmp_path: Path, kind: str, strategy: str, how: str | None, layer: int | None
) -> None:
    adapted = adapted_on(folders[kind], strategy, how, layer)
    plain = adapted_on(folders[kind], strategy, None, None)
    assert adapted.fingerprint == plain.fingerprint
    tiny.shake(adapted)
    inputs = tiny.inputs(adapted.model)
    wanted = tiny.logits(adapted.model, inputs)
    out = adapters.save(adapted, tmp_path / "out")
    again = adapters.load(out)
    assert torch.equal(tiny.logits(again.model, inputs), wanted)
    assert (again.trained, again.head, again.task) == (adapted.trained, adapted.head, adapted.task)
    assert pooling.placed(again.model) == Reading(how or "own", layer)
    names = block_lists(plain.model)[-1].names()
    idle = tuple(f"{path}." for path in names[layer if layer is not None else len(names) :])
    assert not idle or not any(name.startswith(idle) for name in adapted.trained)
    gradients(adapted.model, inputs)
    untouched = {name for name in adapted.trained if dict(adapted.model.named_parameters())[name].grad is None}
    assert not untouched


def gradients(model: Any, inputs: dict[str, Any]) -> None:
    model(**inputs).logits.square().sum().backward()


def test_a_fresh_process_gives_the_same_logits(folders: dict[str, str], tmp_path: Path) -> None:
    adapted = adapted_on(folders["bert"], "lora", "mean", 2)
    tiny.shake(adapted)
    adapters.save(adapted, tmp_path / "out")
    torch.save(tiny.logits(adapted.model), tmp_path / "wanted.pt")
    script = (
        "import sys, torch, tiny, adapters; a = adapters.load(sys.argv[1]); "
        "assert torch.equal(tiny.logits(a.model), torch.load(sys.argv[2]))"
    )
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "out", tmp_path / "wanted.pt"], check=True, cwd=Path(__file__).parent
    )


def test_a_live_model_keeps_its_object_and_a_failed_request_leaves_it_alone() -> None:
    model = tiny.model("bert")
    before = tiny.logits(model)
    with pytest.raises(RequestError, match="lies above the place"):
        adapters.adapt(model, "freeze", pattern=r"layer\.2\.", layer=2, **LABELS)
    with pytest.raises(RequestError, match="no block 2"):
        adapters.adapt(model, "lora", layers_to_transform=[2], layer=2, **LABELS)
    with pytest.raises(RequestError, match="lies above the place"):
        adapters.adapt(model, "lora", target_modules=["pooler.dense"], pooling="mean", **LABELS)
    assert bare(model)
    assert torch.equal(tiny.logits(model), before)
    adapted = adapters.adapt(model, "freeze", layers=2, layer=2, pooling="mean", **LABELS)
    assert adapted.model is model
    assert type(model).__name__ == "BertForSequenceClassification"
    blocks = {name.split(".")[3] for name in adapted.trained if ".layer." in name}
    assert blocks == {"0", "1"}
    tiny.shake(adapted)
    read = tiny.logits(model)
    with pytest.raises(RequestError):
        adapters.adapt(model, "lora", layers_to_transform=[7], pooling="last", **LABELS)
    assert torch.equal(tiny.logits(model), read)  # where the earlier adaptation read
    adapters.adapt(model, "probe", **LABELS)
    assert bare(model)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pooling": "median"}, "unknown pooling 'median'"),
        ({"layer": 0}, "a wrong number of blocks"),
        ({"layer": "2"}, "a wrong value"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        adapters.adapt(tiny.model("bert"), "probe", **LABELS, **options)
    if options.get("pooling") is None:
        with pytest.raises(RequestError, match=said):
            adapters.adapt(tiny.model("bert", auto="AutoModelForTokenClassification"), "probe", **options)


def test_the_last_place_of_a_picture_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown pooling 'last'"):
        adapters.adapt(tiny.model("vit"), "probe", pooling="last", **LABELS)


@pytest.mark.parametrize("strategy", ["lora", "freeze", "full"])
def test_a_run_keeps_its_contract_where_the_head_reads_elsewhere(
    folders: dict[str, str], tmp_path: Path, strategy: str
) -> None:
    """Trained with validation; every trained tensor moves, the adapter opens anew with the same answers."""
    adapted = adapted_on(folders["distilbert"], strategy, "mean", 2)
    start = {name: tensor.clone() for name, tensor in adapted.state().items()}
    trainer = adapters.Trainer(
        adapted,
        {"output_dir": str(tmp_path / "run"), **QUIET, "warm_head": False},  # a solved start may be the best already
        tiny.rows(24),
        tiny.rows(12, seed=1),
    )
    trainer.train()
    assert all(not torch.equal(tensor, start[name]) for name, tensor in adapted.state().items())
    rows = tiny.rows(6, seed=2)
    wanted = adapters.predict(adapted, rows)
    again = adapters.load(adapters.save(adapted, tmp_path / "out"))
    assert adapters.predict(again, rows) == wanted
    assert adapters.evaluate(again, rows) == adapters.evaluate(adapted, rows)


def test_with_a_layer_the_prefix_ends_there() -> None:
    """The cut lies at the layer, and the blocks above are no part of it."""
    adapted = adapters.adapt(tiny.model("bert"), "probe", pooling="mean", layer=2, **LABELS)
    cut = prefix.cut_of(adapted.model, adapted.trained)
    names = block_lists(adapted.model)[0].names()
    assert cut is not None
    assert cut.path == names[-1]
    assert len(names) == 2
    kept = prefix.Prefix(adapted.model, cut)
    inputs = tiny.inputs(adapted.model)
    assert kept.fault(inputs) == ""
    with kept.given(inputs) as taken:
        assert taken
        cached = tiny.logits(adapted.model, inputs)
    torch.testing.assert_close(cached, tiny.logits(adapted.model, inputs))
    assert pooling.placed(adapted.model) == Reading("mean", 2)


# ---------------------------------------------------------------------- moved later


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_a_head_moved_after_adapting_is_saved_where_it_reads(
    folders: dict[str, str], tmp_path: Path, kind: str
) -> None:
    adapted = adapted_on(folders[kind], "probe", None, None)
    before = adapted.trained
    relocation.move(adapted, "mean", 2)
    assert set(adapted.trained) < set(before) or kind == "bert"
    tiny.shake(adapted)
    inputs = tiny.inputs(adapted.model)
    wanted = tiny.logits(adapted.model, inputs)
    again = adapters.load(adapters.save(adapted, tmp_path / "out"))
    assert torch.equal(tiny.logits(again.model, inputs), wanted)
    assert (again.task.pooling, again.task.layer) == ("mean", 2)
    assert again.trained == adapted.trained
    relocation.move(adapted, None, None)
    assert bare(adapted.model)
    assert adapted.trained == before
    takes = {name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad}
    assert takes == set(before)


def test_a_head_is_not_moved_below_what_trains() -> None:
    adapted = adapters.adapt(tiny.model("bert"), "lora", **LABELS)
    wanted = tiny.logits(adapted.model)
    with pytest.raises(RequestError, match="lies above the place"):
        relocation.move(adapted, "mean", 2)
    assert torch.equal(tiny.logits(adapted.model), wanted)
    assert adapted.record.task is None
    relocation.move(adapted, "mean", None)
    assert adapted.record.task is not None
    assert adapted.record.task.pooling == "mean"


@pytest.mark.parametrize("options", [{"pooling": "sum"}, {"layer": 0}, {"layer": True}, {"layer": 99}, {"pooling": 1}])
def test_a_manifest_with_a_reading_that_cannot_be_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = tiny.folder("bert", tmp_path / "bert")
    out = adapters.save(adapted_on(folder, "probe", "mean", 2), tmp_path / "out")
    file = out / manifest.MANIFEST
    document = json.loads(file.read_text())
    document["task"]["options"] |= options
    document["digest"] = shards.digest_of(document)
    file.write_text(json.dumps(document))
    with pytest.raises((FolderError, RequestError)):
        adapters.load(out)
    if options != {"layer": 99}:  # how many blocks there are, only the backbone tells
        with pytest.raises(FolderError, match="no version of ours"):
            manifest.read_manifest(out)


# ---------------------------------------------------------------------- beside other parts


def test_peft_does_not_open_what_it_would_answer_otherwise(tmp_path: Path) -> None:
    folder = tiny.folder("bert", tmp_path / "bert")
    names = {"adapter_config.json", manifest.WEIGHTS}
    plain = adapters.save(adapted_on(folder, "lora", None, None), tmp_path / "plain")
    assert names <= {file.name for file in plain.iterdir()}
    out = adapters.save(adapted_on(folder, "lora", "mean", None), tmp_path / "out")
    assert names & {file.name for file in out.iterdir()} == {manifest.WEIGHTS}
    assert "reads the mean hidden state" in (out / "README.md").read_text()


def test_a_head_that_reads_otherwise_than_is_saved_is_noticed(tmp_path: Path) -> None:
    adapted = adapters.adapt(tiny.model("bert"), "probe", pooling="mean", **LABELS)
    tiny.shake(adapted)
    rows = [{name: value[row] for name, value in tiny.batch().items()} for row in range(4)]

    def collate(some: list[Any]) -> dict[str, Any]:
        return {name: torch.stack([row[name] for row in some]) for name in some[0]}

    fidelity.reopened(adapted, rows, collate, tmp_path)
    pooling.place(adapted.model, "last")
    with pytest.raises(ContractError, match="does not answer as the trained model does"):
        fidelity.reopened(adapted, rows, collate, tmp_path)


@pytest.mark.parametrize("how", [None, "mean"])
def test_in_four_bits_the_blocks_that_run_are_packed(tmp_path: Path, how: str | None) -> None:
    pytest.importorskip("bitsandbytes")
    folder = tiny.folder("llama", tmp_path / "llama", hidden_size=64, intermediate_size=128)
    adapted = adapted_on(folder, "qlora", how, 2)
    tiny.shake(adapted)
    packed = {name.split(".")[2] for name, module in adapted.model.named_modules() if "Linear4bit" in str(type(module))}
    assert packed == {"0", "1"}
    wanted = tiny.logits(adapted.model)
    again = adapters.load(adapters.save(adapted, tmp_path / "out"))
    assert torch.equal(tiny.logits(again.model), wanted)
    relocation.move(again, how, 2)  # tried on the packed weights, which stay as they are
    assert torch.equal(tiny.logits(again.model), wanted)
    adapters.merge_on_disk(tmp_path / "out", tmp_path / "merged", check_logits=False)
    if how is None:
        opened = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    else:
        opened = adapters.load(tmp_path / "merged").model
    assert float((tiny.logits(opened) - wanted).abs().max()) < 0.1 * float(wanted.std())


def test_a_layer_of_a_token_classifier_is_saved(tmp_path: Path) -> None:
    folder = tiny.folder("bert", tmp_path / "bert")
    adapted = adapters.adapt(folder, "lora", task="token-classification", labels=["O", "B-X", "I-X"], layer=1)
    tiny.shake(adapted)
    again = adapters.load(adapters.save(adapted, tmp_path / "out"))
    assert torch.equal(tiny.logits(again.model), tiny.logits(adapted.model))
    assert block_lists(again.model)[0].length == 1
    assert adapters.predict(again, [["where", "is", "it"]]) == adapters.predict(adapted, [["where", "is", "it"]])


def test_a_forward_that_stood_on_a_block_stands_there_again() -> None:
    """accelerate puts one on each module where it spreads a model over devices."""
    model = tiny.model("bert")
    block = model.bert.encoder.layer[2]
    own = block.forward

    def spread(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    vars(block)["forward"] = spread
    before = tiny.logits(model)
    pooling.place(model, None, 2)
    assert not torch.equal(tiny.logits(model), before)
    pooling.strip(model)
    assert vars(block)["forward"] is spread
    assert torch.equal(tiny.logits(model), before)
