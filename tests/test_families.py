"""Every family of backbones: its graph is read right, its tensors keep their names, and every strategy holds on it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adapters
from adapters import anatomy, order, quantize
from adapters import fingerprint as prints

# Block lists (path and number of blocks, encoder before decoder) and linear maps of `tiny.model(kind)`.
GRAPHS: dict[str, tuple[dict[str, int], int]] = {
    "bert": ({"bert.encoder.layer": 3}, 18),
    "roberta": ({"roberta.encoder.layer": 3}, 18),
    "xlm-roberta": ({"roberta.encoder.layer": 3}, 18),
    "albert": ({"albert.encoder.albert_layer_groups": 1}, 6),
    "distilbert": ({"distilbert.transformer.layer": 3}, 18),
    "electra": ({"electra.encoder.layer": 3}, 18),
    "deberta-v2": ({"deberta.encoder.layer": 3}, 18),
    "modernbert": ({"model.layers": 3}, 12),  # fused query, key and value; fused gate
    "mpnet": ({"mpnet.encoder.layer": 3}, 18),
    "gpt2": ({"transformer.h": 3}, 12),
    "llama": ({"model.layers": 3}, 21),
    "mistral": ({"model.layers": 3}, 21),
    "qwen2": ({"model.layers": 3}, 21),
    "qwen3": ({"model.layers": 3}, 21),
    "phi3": ({"model.layers": 3}, 12),  # fused projections
    "gemma": ({"model.layers": 3}, 21),
    "gemma2": ({"model.layers": 3}, 21),
    "mixtral": ({"model.layers": 3}, 12),  # experts are one tensor, no linear maps
    "t5": ({"transformer.encoder.block": 3, "transformer.decoder.block": 3}, 48),
    "bart": ({"model.encoder.layers": 3, "model.decoder.layers": 3}, 48),
    "marian": ({"model.encoder.layers": 3, "model.decoder.layers": 3}, 48),
    "vit": ({"vit.layers": 3}, 18),
    "deit": ({"deit.layers": 3}, 18),
    "dinov2": ({"dinov2.encoder.layer": 3}, 18),
    "swin": ({"swin.encoder.layers": 2}, 25),  # stages of two blocks of six maps, and one that merges patches
    "resnet": ({"resnet.encoder.stages": 2}, 0),
}
# What runs after the last block, inside the backbone.
ABOVE = {
    "bert": {"bert.pooler.dense.weight", "bert.pooler.dense.bias"},
    "albert": {"albert.pooler.weight", "albert.pooler.bias"},
    "modernbert": {"model.final_norm.weight"},
    "gpt2": {"transformer.ln_f.weight", "transformer.ln_f.bias"},
    "t5": {"transformer.decoder.final_layer_norm.weight"},
    "vit": {"vit.layernorm.weight", "vit.layernorm.bias"},
    "deit": {"deit.layernorm.weight", "deit.layernorm.bias"},
    "dinov2": {"dinov2.layernorm.weight", "dinov2.layernorm.bias"},
    "swin": {"swin.layernorm.weight", "swin.layernorm.bias"},
} | {kind: {"model.norm.weight"} for kind in tiny.DECODERS if kind != "gpt2"}
CELLS = [
    pytest.param(kind, auto, id=f"{kind}-{auto.removeprefix('AutoModelFor')}")
    for kind in tiny.FAMILIES
    for auto in tiny.heads(kind)
]
TASK = {
    tiny.CLASSIFICATION: "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForSeq2SeqLM": "seq2seq",
    "AutoModelForMaskedLM": "masked-lm",
    "AutoModelForCausalLM": "causal-lm",
}
STRATEGIES = {"full": {}, "freeze": {"layers": 1}, "probe": {}, "bitfit": {}, "lora": {}, "qlora": {}}
NO_BIASES = ("modernbert", "llama", "mistral", "qwen3", "phi3", "gemma", "gemma2", "mixtral", "t5")
REFUSALS = {
    ("freeze", "albert"): r"share one set of weights.*Take 'lora', 'bitfit', 'probe' or 'full'",
    ("lora", "resnet"): r"no linear maps.*Take 'freeze', 'bitfit', 'probe' or 'full'",
    ("probe", "marian"): r"no head to train.*Take 'lora'",
} | {("bitfit", kind): r"no biases.*Take 'lora', or 'probe'" for kind in NO_BIASES}


def cells(strategies: list[str], kinds: tuple[str, ...]) -> list[Any]:
    return [
        pytest.param(strategy, kind, id=f"{strategy}-{kind}")
        for strategy in strategies
        for kind in kinds
        if (strategy, kind) not in REFUSALS
    ]


def head_of(model: Any, auto: str) -> frozenset[str]:
    """What a task of this Auto class would call its head; a language model's output layer is pretrained."""
    return frozenset() if auto.endswith("LM") else frozenset(anatomy.outside_backbone(model))


def top_block(model: Any) -> str:
    return anatomy.block_lists(model)[-1].names()[-1]


def bytes_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---------------------------------------------------------------------- the graph


def test_every_family_has_a_row() -> None:
    assert set(GRAPHS) == set(tiny.FAMILIES) == set(tiny.CONFIGS)
    for kind in tiny.FAMILIES:
        assert tiny.heads(kind)


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_blocks_and_linear_maps(kind: str) -> None:
    model = tiny.model(kind)
    lists = anatomy.block_lists(model)
    paths, maps = GRAPHS[kind]
    assert [(blocks.path, blocks.length) for blocks in lists] == list(paths.items())
    assert any(blocks.shared for blocks in lists) is (kind == "albert")
    found = anatomy.linear_maps(model)
    assert len(found) == maps
    head = head_of(model, tiny.heads(kind)[0])
    for path, described in found.items():
        assert f"{path}.weight" not in head
        weight = model.get_submodule(path).weight
        assert tuple(weight.shape) == (described.shape if described.transposed else described.shape[::-1])
        assert described.has_bias is (model.get_submodule(path).bias is not None)


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_above_is_what_runs_after_the_last_block(kind: str) -> None:
    model = tiny.model(kind)
    assert order.above_blocks(model) == ABOVE.get(kind, set())
    assert order.above_blocks(anatomy.skeleton(model)) == ABOVE.get(kind, set())  # strategies are tried on it first


@pytest.mark.parametrize(("kind", "auto"), CELLS)
def test_the_output_layer_is_never_above(kind: str, auto: str) -> None:
    model = tiny.model(kind, auto=auto)
    above = order.above_blocks(model)
    output = model.get_output_embeddings()
    if output is not None:
        assert not {id(p) for p in output.parameters()} & {id(p) for n, p in model.named_parameters() if n in above}
    assert not any("embed" in name or "rel" in name or ".wte" in name for name in above)


def flowing_in(
    model: nn.Module, path: str, inputs: dict[str, Any], *, training: list[nn.Module] | None
) -> list[Tensor]:
    """The tensors that a module is called with, in eval mode or while training with these modules kept quiet."""
    seen: list[Tensor] = []

    def watch(_module: nn.Module, args: Any, kwargs: Any) -> None:
        if not seen:
            seen.extend(value.clone() for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

    handle = model.get_submodule(path).register_forward_pre_hook(watch, with_kwargs=True)
    model.train(training is not None)
    for module in training or []:
        module.training = False
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_what_runs_below_is_a_pure_function_of_its_input(kind: str) -> None:
    """With dropout wherever a config asks for it: what reaches the first trained module is what evaluation gives."""
    model = tiny.model(kind)
    inputs = tiny.inputs(model)
    if kind == "albert":
        path, trained = "classifier", head_of(model, tiny.CLASSIFICATION)  # its blocks cannot train apart
    else:
        path = top_block(model)
        trained = frozenset(name for name, _ in model.named_parameters() if name.startswith(f"{path}."))
    quiet = order.frozen_below(model, trained)
    wanted = flowing_in(model, path, inputs, training=None)
    found = flowing_in(model, path, inputs, training=quiet)
    assert wanted
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))
    inside = set(map(id, model.get_submodule(path).modules()))
    assert not inside & {id(module) for module in quiet if getattr(module, "running_mean", None) is None}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "bart", "distilbert", "deberta-v2"])
def test_what_trains_keeps_its_dropout(kind: str) -> None:
    model = tiny.model(kind)
    inputs = tiny.inputs(model)
    everything = {name for name, _ in model.named_parameters()}
    assert order.frozen_below(model, everything) == []
    path = top_block(model)
    wanted = flowing_in(model, path, inputs, training=None)
    found = flowing_in(model, path, inputs, training=[])
    assert not all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))


def test_a_pass_without_weights_leaves_the_model_alone() -> None:
    model = tiny.model("t5")
    before, config, modules = bytes_of(model), model.config.to_dict(), list(model.modules())
    random = torch.get_rng_state()
    calls = order.passage(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    assert all(one is other for one, other in zip(modules, model.modules(), strict=True))
    assert not any(module._forward_pre_hooks for module in model.modules())
    first, last = calls["transformer.decoder.dropout"]
    assert first < calls["transformer.decoder.block.0"][0]
    assert last > calls["transformer.decoder.block.2"][1]  # one module, used below the blocks and above them


def test_a_model_that_needs_data_is_read_in_its_order_of_registration(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(model: Any) -> tuple[set[str], set[str]]:
        below = set(map(id, order.frozen_below(model, {"classifier.weight"})))
        return order.above_blocks(model), {path for path, module in model.named_modules() if id(module) in below}

    seen = found(tiny.model("bert"))
    monkeypatch.setattr(order, "_inputs", lambda _: {"input_features": torch.zeros(1)})
    with caplog.at_level("INFO", logger="adapters.order"):
        assert found(tiny.model("bert")) == seen  # a model of its own: what is seen of one is known
    assert "BertForSequenceClassification cannot be run without data" in caplog.text


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_freeze_takes_the_decoders_last_blocks(kind: str) -> None:
    adapted = adapters.adapt(tiny.model(kind), "freeze", layers=1)
    decoder = anatomy.block_lists(adapted.model)[-1]
    backbone = set(adapted.trained) - adapted.head
    assert "decoder" in decoder.path
    assert backbone
    assert all(name.startswith(f"{decoder.path}.2.") or name in ABOVE.get(kind, ()) for name in backbone)


def test_a_head_is_found_where_the_class_holds_the_backbone_itself() -> None:
    answers = tiny.model("t5", auto="AutoModelForQuestionAnswering")
    assert answers.base_model is answers
    assert anatomy.outside_backbone(answers) == {"qa_outputs.weight", "qa_outputs.bias"}
    for model in (tiny.model("t5", auto="AutoModelForSeq2SeqLM"), tiny.backbone("bert")):
        with pytest.raises(adapters.RequestError, match="no backbone apart from its head"):
            anatomy.outside_backbone(model)


# ---------------------------------------------------------------------- names and identity


@pytest.mark.parametrize(("kind", "auto"), CELLS)
def test_names_and_fingerprint_are_those_of_the_checkpoint(kind: str, auto: str, tmp_path: Path) -> None:
    model = tiny.model(kind, auto=auto)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    loaded = type(model).from_pretrained(tmp_path)
    for net in (model, loaded):
        state = anatomy.backbone_state(net, ())
        names, on_disk = anatomy.saved_names(net, state)
        assert set(on_disk) == set(written)
        assert all(torch.equal(tensor, written[name]) for name, tensor in on_disk.items())
        assert all(torch.equal(state[memory], written[disk]) for memory, disk in names.items())
    head = head_of(loaded, auto)
    from_disk, from_memory = prints.of_folder(loaded, head, tmp_path), prints.of_model(loaded, head)
    assert prints.differences(from_disk, from_memory) == []
    assert from_disk.digest == from_memory.digest
    skipped = head | anatomy.never_saved(loaded)
    changed = [p for n, p in loaded.named_parameters() if n not in skipped]
    for parameter in (changed[0], changed[len(changed) // 2], changed[-1]):
        with torch.no_grad():
            last = parameter.view(-1)[-1:]
            kept = last.clone()
            last.copy_(torch.nextafter(kept, torch.tensor(9.0)))
            lines = prints.differences(from_disk, prints.of_model(loaded, head))
            last.copy_(kept)
        assert len(lines) == 1, lines
        assert lines[0].endswith(": other values")


def test_what_the_class_computes_is_neither_saved_nor_trained() -> None:
    model = tiny.model("marian", auto="AutoModelForSeq2SeqLM")
    positions = {"model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"}
    assert anatomy.never_saved(model) == positions
    adapted = adapters.adapt(model, "full", task="seq2seq")
    assert set(adapted.trained) == {name for name, _ in model.named_parameters()} - positions


# ---------------------------------------------------------------------- strategies in a live model


@pytest.mark.parametrize(("strategy", "kind"), cells([*STRATEGIES][:-1], tiny.FAMILIES))
def test_stripped_means_the_very_objects(strategy: str, kind: str) -> None:
    auto = tiny.heads(kind)[0]
    model = tiny.model(kind)
    modules, parameters, before = dict(model.named_modules()), dict(model.named_parameters()), bytes_of(model)
    wanted = tiny.logits(model, tiny.inputs(model))
    adapted = adapters.adapt(model, strategy, task=TASK[auto], **STRATEGIES[strategy])
    assert adapted.head == head_of(model, auto)
    assert adapted.head <= {anatomy.own_name(name) for name in adapted.trained}
    adapted.strategy.strip(model)
    assert dict(model.named_modules()) == modules
    found = dict(model.named_parameters())
    assert list(found) == list(parameters)
    assert all(found[name] is parameter for name, parameter in parameters.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(tiny.logits(model, tiny.inputs(model)), wanted)
    assert not {"peft_config", "_hf_peft_config_loaded"} & set(vars(model))


@pytest.mark.parametrize(("strategy", "kind"), list(REFUSALS), ids=lambda value: value)
def test_what_cannot_be_names_what_to_take(strategy: str, kind: str) -> None:
    auto = tiny.heads(kind)[0]
    model = tiny.model(kind)
    modules, before, config = dict(model.named_modules()), bytes_of(model), model.config.to_dict()
    with pytest.raises(adapters.RequestError, match=REFUSALS[strategy, kind]):
        adapters.adapt(model, strategy, task=TASK[auto])
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config


# ---------------------------------------------------------------------- saved, loaded, merged


def holds_together(strategy: str, base: str, auto: str, folder: Path, **options: Any) -> None:
    """Adapt, move, save, load, merge in memory and on disk: the same answers, bit for bit before merging."""
    import transformers

    labels = {"labels": list(tiny.LABELS)} if auto.endswith("Classification") else {}
    adapted = adapters.adapt(base, strategy, task=TASK[auto], **labels, **options)
    tiny.shake(adapted)
    inputs = tiny.inputs(adapted.model)
    wanted = answers(adapted.model, inputs)
    adapters.save(adapted, folder / "adapter")
    again = adapters.load(folder / "adapter")
    assert torch.equal(answers(again.model, inputs), wanted)
    report = adapters.merge_on_disk(folder / "adapter", folder / "merged", check_logits=False)
    assert report.verified == report.edited
    made = getattr(transformers, auto).from_pretrained(folder / "merged", output_loading_info=True)
    merged, info = made
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    bound = 1e-4 * max(float(wanted.std()), 1.0)
    assert float((answers(merged, inputs) - wanted).abs().max()) <= bound
    if adapted.storage.quantization is not None:
        return
    in_memory = adapters.merge(again)
    assert float((answers(in_memory, inputs) - wanted).abs().max()) <= bound
    on_disk = merged.state_dict()
    assert all(torch.equal(tensor, on_disk[name]) for name, tensor in in_memory.state_dict().items())


def answers(model: Any, inputs: dict[str, Any]) -> Tensor:
    model.eval()
    with torch.no_grad():
        outputs = model(**inputs)
    return torch.cat([outputs[name].flatten() for name in outputs if name.endswith("logits")])


CLASSIFIERS = tuple(kind for kind in tiny.FAMILIES if tiny.CLASSIFICATION in tiny.heads(kind))


@pytest.mark.parametrize(("strategy", "kind"), cells([*STRATEGIES], CLASSIFIERS))
def test_classifiers_on_a_headless_checkpoint(strategy: str, kind: str, tmp_path: Path) -> None:
    base = tiny.folder(kind, tmp_path / "base")
    holds_together(strategy, base, tiny.CLASSIFICATION, tmp_path, **STRATEGIES[strategy])


# Encoders fill in what is masked, encoder-decoders do not.
LANGUAGE = [
    (kind, auto)
    for kind in tiny.FAMILIES
    for auto in tiny.heads(kind)
    if auto.endswith("LM")
    and not (TASK[auto] == "causal-lm" and kind in tiny.TEXT)
    and not (TASK[auto] == "masked-lm" and kind in tiny.ENCODER_DECODERS)
]


@pytest.mark.parametrize("strategy", ["full", "lora"])
@pytest.mark.parametrize(("kind", "auto"), LANGUAGE, ids=lambda value: value.removeprefix("AutoModelFor"))
def test_language_models_and_their_tied_weights(strategy: str, kind: str, auto: str, tmp_path: Path) -> None:
    holds_together(strategy, tiny.folder(kind, tmp_path / "base", auto=auto), auto, tmp_path)


@pytest.mark.parametrize("kind", ["xlm-roberta", "gpt2", "mixtral", "t5", "bart"])
def test_classifiers_on_a_language_models_checkpoint(kind: str, tmp_path: Path) -> None:
    auto = next(name for name in tiny.heads(kind) if name.endswith("LM"))
    holds_together("full", tiny.folder(kind, tmp_path / "base", auto=auto), tiny.CLASSIFICATION, tmp_path)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "bart"])
def test_question_answering(kind: str, tmp_path: Path) -> None:
    holds_together("lora", tiny.folder(kind, tmp_path / "base"), "AutoModelForQuestionAnswering", tmp_path)


@pytest.mark.parametrize(("strategy", "kind"), [c for c in cells([*STRATEGIES], tiny.IMAGES) if c.id != "qlora-resnet"])
def test_image_classifiers(strategy: str, kind: str, tmp_path: Path) -> None:
    base = tiny.folder(kind, tmp_path / "base")
    holds_together(strategy, base, "AutoModelForImageClassification", tmp_path, **STRATEGIES[strategy])


def test_debertas_new_pooler_trains_and_is_saved(tmp_path: Path) -> None:
    base = tiny.folder("deberta-v2", tmp_path / "base")
    for strategy in ("probe", "lora"):
        adapted = adapters.adapt(base, strategy, task="text-classification", labels=list(tiny.LABELS))
        assert {"pooler.dense.weight", "pooler.dense.bias", "classifier.weight"} <= set(adapted.record.new)
        adapters.save(adapted, tmp_path / strategy)
        written = json.loads((tmp_path / strategy / "adapter.json").read_text())["tensors"]
        assert {"pooler.dense.weight", "pooler.dense.bias"} <= {n.removeprefix("base_model.model.") for n in written}


def test_experts_in_pieces_need_whole_tensors(tmp_path: Path) -> None:
    """Mixtral's experts are three matrices each on disk and two tensors in memory."""
    base = tiny.folder("mixtral", tmp_path / "base")
    adapted = adapters.adapt(base, "freeze", layers=1, task="text-classification", labels=list(tiny.LABELS))
    tiny.shake(adapted)
    adapters.save(adapted, tmp_path / "adapter")
    adapters.merge_on_disk(tmp_path / "adapter", tmp_path / "merged", check_logits=False)
    before, after = load_file(Path(base) / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[f"model.{name}"])}
    assert moved == {name for name in before if name.startswith(("layers.2.", "norm."))}
    assert sum(".experts." in name for name in moved) == 4 * 3

    from adapters import parts
    from adapters.edits import AddLowRank
    from adapters.manifest import read_manifest

    document = read_manifest(tmp_path / "adapter")
    edit = AddLowRank(torch.zeros(1, 32), torch.zeros(32, 1), 1.0)
    with pytest.raises(adapters.RequestError, match=r"other pieces than memory.*adapters\.merge\(adapters\.load"):
        parts.on_disk({"model.layers.0.mlp.experts.down_proj": edit}, document, Path(base))


# ---------------------------------------------------------------------- four bits


@pytest.mark.parametrize("kind", [kind for kind in tiny.FAMILIES if kind != "resnet"])
def test_four_bits_answer_as_the_weights_they_stand_for(kind: str) -> None:
    model = tiny.model(kind)
    plain = copy.deepcopy(model)
    inputs = tiny.inputs(model)
    unpacked = answers(model, inputs)
    maps = quantize.packable(model)
    done = quantize.pack(model, maps, quantize.Storage("nf4"))
    assert set(done) == {found.path for found in maps}
    left = set(anatomy.linear_maps(plain)) - set(done)
    assert {path.rpartition(".")[2] for path in left} == ({"wo"} if kind == "t5" else set())
    with torch.no_grad():
        for found in maps:
            dense = quantize.dequantized(model.get_submodule(found.path))
            plain.get_submodule(found.path).weight.copy_(dense.T if found.transposed else dense)
    wanted, given = answers(plain, inputs), answers(model, inputs)
    assert not torch.equal(unpacked, given)
    assert float((given - wanted).abs().max()) <= 1e-4 * max(float(wanted.std()), 1.0)


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(adapters.RequestError, match="nothing to pack"):
        adapters.adapt(tiny.model("resnet"), "probe", task="image-classification", quantization="nf4")


# ---------------------------------------------------------------------- running statistics


@pytest.mark.parametrize("strategy", ["full", "freeze", "bitfit", "probe"])
def test_running_statistics_belong_to_the_backbone(strategy: str, tmp_path: Path) -> None:
    """They are in the fingerprint and stay where they are under every strategy: no adapter would bring them back."""
    base = tiny.folder("resnet", tmp_path / "base")
    labels = list(tiny.LABELS)
    adapted = adapters.adapt(base, strategy, task="image-classification", labels=labels, **STRATEGIES[strategy])
    model = adapted.model
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert statistics
    named = {name.removeprefix("resnet.") for name in statistics}
    assert named <= set(adapted.fingerprint.tensors)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    inputs = tiny.inputs(model)
    for _ in range(3):
        model.train()
        for module in order.frozen_below(model, adapted.trained):
            module.training = False
        loss = model(**inputs).logits.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    wanted = answers(model, inputs)
    adapters.save(adapted, tmp_path / "adapter")
    assert torch.equal(answers(adapters.load(tmp_path / "adapter").model, inputs), wanted)
    moved = next(buffer for name, buffer in model.named_buffers() if name.endswith("running_mean"))
    moved += 0.5
    lines = prints.differences(adapted.fingerprint, prints.of_model(model, adapted.head | set(adapted.trained)))
    assert any("running_mean: other values" in line for line in lines)
