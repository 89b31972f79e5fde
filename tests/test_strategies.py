"""What one strategy does that others do not: named rows, starts, refusals, rates, unfreezing, odd module graphs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as t
from test_trainer import Cut, adapted_on, same, trainer_for

import adapters
from adapters import pace
from adapters.anatomy import outside_backbone, own_name, skeleton
from adapters.strategies.bitfit import BitFit
from adapters.strategies.freeze import Freeze
from adapters.strategies.full import Full
from adapters.strategies.lora import Lora
from adapters.strategies.peft import METHODS, Peft
from adapters.strategies.probe import Probe

ROWS = ("dora", "rslora", "pissa", "ia3", "oft", "boft", "loha", "lokr", "hra")


def bytes_of(model: Any) -> dict[str, torch.Tensor]:
    return {own_name(name): tensor.clone() for name, tensor in model.state_dict().items()}


# ---------------------------------------------------------------------- named rows


@pytest.mark.parametrize("kind", METHODS)
def test_the_options_of_a_method_are_those_that_peft_has(kind: str) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    fields = next(
        config.__dataclass_fields__ for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if name.value == kind
    )
    # What is no option: peft's own book-keeping, what is read off the graph, what always trains, convolutions.
    ours = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    ours |= {"inference_mode", "fan_in_fan_out", "modules_to_save", "layers_pattern", "use_effective_conv2d"}
    assert METHODS[kind].names == set(fields) - ours


def test_options_go_by_pefts_names() -> None:
    adapted = adapters.adapt(tiny.model("bert"), "oft", oft_block_size=4, target_modules=["query"])
    layers = [module for module in adapted.model.modules() if type(module).__module__ == "peft.tuners.oft.layer"]
    blocks = [module.oft_block_size["default"] for module in layers if hasattr(module, "oft_block_size")]
    assert blocks == [4, 4, 4]


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ("oft", {"block_size": 4}, ("unknown option 'block_size'", "oft_block_size", "strategy 'oft'")),
        ("boft", {"boft_blok_size": 4}, ("Did you mean 'boft_block_size'",)),
        ("ia3", {"r": 4}, ("unknown option 'r'", "strategy 'ia3'")),
        ("dora", {"oft_block_size": 4}, ("unknown option 'oft_block_size'",)),
        ("loha", {"rank": 4}, ("unknown option 'rank'", "'r'")),
        ("loha", {"rank_pattern": {"zz": 4}}, ("'zz'", "rank_pattern")),
        ("hra", {"r": 0}, ("peft refuses", "positive integer", "query")),
        ("hra", {"r": "eight"}, ("HRAConfig", "query")),
        ("oft", {"oft_block_size": 5}, ("does not take oft_block_size=5", "such as 4", "query")),
        ("oft", {}, ("does not take oft_block_size=32", "output.dense")),
        ("oft", {"oft_block_size": 4, "r": 4}, ("peft refuses",)),
        ("ia3", {"feedforward_modules": ["value"], "target_modules": ["query"]}, ("feedforward_modules",)),
        ("lokr", {"target_modules": ["qurey"]}, ("Did you mean 'query'",)),
    ],
)
def test_wrong_options_of_a_row_are_refused(row: str, options: dict[str, Any], said: tuple[str, ...]) -> None:
    model = tiny.model("bert")
    before = bytes_of(model)
    modules = dict(model.named_modules())
    with pytest.raises(adapters.RequestError) as caught:
        adapters.adapt(model, row, **options)
    assert all(word in str(caught.value) for word in said), str(caught.value)
    assert "\n" not in str(caught.value)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("row", ROWS)
def test_what_is_saved_opens_without_its_row(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"oft_block_size": 4} if row == "oft" else {}
    adapted = adapters.adapt(tiny.folder("bert", tmp_path / "base"), row, labels=list(tiny.LABELS), **options)
    rate, epochs = adapted.strategy.defaults["learning_rate"], adapted.strategy.defaults["num_train_epochs"]
    assert 1e-5 < (rate(adapted.model) if callable(rate) else rate) < 0.1
    assert 1 <= epochs <= 20
    tiny.shake(adapted)
    adapters.save(adapted, tmp_path / "adapter")
    monkeypatch.delitem(adapters.STRATEGIES, row)
    opened = adapters.load(tmp_path / "adapter")
    assert opened.strategy == adapted.strategy
    assert opened.strategy.defaults == adapted.strategy.defaults
    assert torch.equal(tiny.logits(opened.model), tiny.logits(adapted.model))


def test_a_row_gives_way_to_the_callers_own_option() -> None:
    adapted = adapters.adapt(tiny.model("bert"), "pissa", init_lora_weights="pissa_niter_2", r=2)
    assert adapted.strategy == Lora(
        r=2,
        init_lora_weights="pissa_niter_2",
        target_modules=adapted.strategy.target_modules,
        modules_to_save=adapted.strategy.modules_to_save,
        modules=adapted.strategy.modules,
    )


def test_a_recipe_knows_the_options_of_a_row() -> None:
    plain = {"model": "m", "data": "d.csv", "output": "o", "strategy": "oft"}
    assert adapters.Recipe.make({**plain, "options": {"oft_block_size": 4}}, "here").options == {"oft_block_size": 4}
    with pytest.raises(adapters.RequestError, match="Did you mean 'oft_block_size'"):
        adapters.Recipe.make({**plain, "options": {"oft_blok_size": 4}}, "here")


# ---------------------------------------------------------------------- peft's methods that cannot be had


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "VERA"}, "shared state"),
        ({"peft_type": "PROMPT_TUNING"}, "wrapper, not in layers"),
        ({"peft_type": "PREFIX_TUNING"}, "wrapper, not in layers"),
        ({"peft_type": "ADALORA", "total_step": 9}, "pruned by peft's own wrapper"),
        ({"peft_type": "GLORA"}, "does not answer as it does adapted"),
        ({"peft_type": "RANDLORA"}, "does not answer as it does adapted"),
        ({"peft_type": "LILY"}, "cannot run or merge"),
        ({"peft_type": "POLY"}, "cannot run or merge|task_ids"),
        ({"peft_type": "TRAINABLE_TOKENS"}, "cannot run or merge|peft refuses"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa", "lora_bias": True}, "Take the strategy 'lora'"),
        ({"peft_type": "LORA", "init_lora_weights": "eva"}, "Take the strategy 'lora'"),
    ],
    ids=lambda value: value["peft_type"] if isinstance(value, dict) else "",
)
def test_a_method_that_breaks_a_law_is_refused_before_anything_changes(config: dict[str, Any], said: str) -> None:
    model = tiny.model("bert")
    before, modules, random = bytes_of(model), dict(model.named_modules()), torch.get_rng_state()
    with pytest.raises(adapters.RequestError, match=said) as caught:
        adapters.adapt(model, "peft", config=config)
    assert "'lora'" in str(caught.value)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    adapters.adapt(model)


@pytest.mark.parametrize("row", ["hra", "loha", "lokr"])
def test_a_method_that_cannot_run_on_four_bits_is_refused_before_packing(row: str) -> None:
    model = tiny.model("bert")
    modules = dict(model.named_modules())
    with pytest.raises(adapters.RequestError, match=r"4-bit layers .*Take 'lora' or 'ia3'"):
        adapters.adapt(model, row, quantization="nf4")
    assert dict(model.named_modules()) == modules
    packed = adapters.adapt(tiny.model("bert"), "probe", quantization="nf4").model
    with pytest.raises(adapters.RequestError, match="4-bit layers"):
        adapters.adapt(packed, row)


def test_a_method_that_overwrites_the_backbone_is_caught_by_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    from adapters.rehearsal import rehearse

    config = peft.LoraConfig(init_lora_weights="olora", target_modules=["dense"])
    with pytest.raises(adapters.RequestError, match="other weights in the backbone's place"):
        rehearse(config, {"layer.dense": [8, 8, False, True]}, packed=False)


@pytest.mark.parametrize("dora", [False, True])
def test_embeddings_are_adapted_and_merged(dora: bool, tmp_path: Path) -> None:
    folder = tiny.folder("bert", tmp_path / "base")
    options = {"target_modules": ["word_embeddings", "query"], "use_dora": dora}
    adapted = adapters.adapt(folder, "lora", labels=list(tiny.LABELS), **options)
    tiny.shake(adapted)
    wanted = tiny.logits(adapted.model)
    merged = adapters.merge(adapted)
    assert float((tiny.logits(merged) - wanted).abs().max()) <= 1e-5


# ---------------------------------------------------------------------- starts

STARTS = ("pissa", "pissa_niter_8", "olora")


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("start", STARTS)
def test_a_start_from_the_weights_changes_no_answer_and_no_weight(start: str, kind: str) -> None:
    model = tiny.model(kind)
    before, answers = bytes_of(model), tiny.logits(model)
    adapted = adapters.adapt(model, "lora", init_lora_weights=start, r=4)
    now = bytes_of(model)
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert float((tiny.logits(model) - answers).abs().max()) <= 1e-5
    path, (size_in, size_out, transposed, _) = next(iter(adapted.strategy.modules.items()))
    layer = model.get_submodule(path)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (tuple(down.shape), tuple(up.shape)) == ((8, size_in), (size_out, 8))
    part = 2 * up[:, :4] @ down[:4]  # alpha / r = 16 / 8 over the first half: what the start takes of the weight
    weight = before[f"{path}.weight"].T if transposed else before[f"{path}.weight"]
    assert torch.linalg.matrix_rank(part) == 4
    if start == "olora":
        assert torch.allclose(up[:, :4].T @ up[:, :4], torch.eye(4), atol=1e-5)
    else:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        best = (left[:, :4] * values[:4]) @ right[:4]
        slack = 1e-5 if start == "pissa" else 0.05 * float(values[0])
        assert float((part * adapted_scale(adapted) - best).abs().max()) <= slack


def adapted_scale(adapted: adapters.Adapted) -> float:
    """lora_alpha / r over the factor that the test multiplied with."""
    return adapted.strategy.lora_alpha / adapted.strategy.r / 2


def test_pissa_trains_as_pefts_own_pissa_does() -> None:
    import peft

    ours = adapters.adapt(tiny.model("bert"), "pissa", r=4, lora_alpha=8)
    theirs = tiny.model("bert")
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=ours.strategy.target_modules),
        theirs,
    )
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name or name in ours.head)
    held = {name: p.detach().clone() for name, p in ours.model.named_parameters() if "lora_" in name}
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    start = tiny.logits(ours.model)
    for net in (ours.model, theirs):
        net.eval()  # no dropout, so that both see the same
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
        for step in range(10):
            optimizer.zero_grad()
            logits = net(**tiny.batch(seed=step)).logits
            torch.nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step()
    moved = float((tiny.logits(ours.model) - start).abs().max())
    assert moved > 0.02
    assert float((tiny.logits(ours.model) - tiny.logits(theirs)).abs().max()) <= 1e-4 * moved
    for name, before in held.items():
        now = dict(ours.model.named_parameters())[name]
        half = (slice(4, None),) if "lora_A" in name else (slice(None), slice(4, None))
        assert torch.equal(now[half], before[half]), name
        assert not torch.equal(now, before), name


def test_pissa_is_saved_as_a_plain_lora_and_trains_on_after_loading(tmp_path: Path) -> None:
    folder = tiny.folder("bert", tmp_path / "base")
    adapted = adapters.adapt(folder, "pissa", labels=list(tiny.LABELS), r=4)
    settings = {"max_steps": 2, "learning_rate": 1e-2, "warmup_steps": 0, "save_strategy": "no", "weight_decay": 0.0}
    trainer_for(tmp_path, adapted, args=settings, eval_dataset=None).train()
    adapters.save(adapted, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 32)
    assert "init_lora_weights" not in config
    opened = adapters.load(tmp_path / "adapter")
    assert opened.fingerprint == adapted.fingerprint
    before = {name: tensor.clone() for name, tensor in opened.state().items()}
    assert same(before, adapted.state())
    trainer_for(tmp_path / "more", opened, args=settings, eval_dataset=None).train()
    name = next(key for key in before if "lora_A" in key)
    assert torch.equal(opened.state()[name][4:], before[name][4:])
    assert not torch.equal(opened.state()[name][:4], before[name][:4])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init_lora_weights": "eva"}, "activations of rows"),
        ({"init_lora_weights": "corda"}, "activations of rows"),
        ({"init_lora_weights": "lora_ga"}, "gradients of rows"),
        ({"init_lora_weights": "loftq"}, "quantized weights"),
        ({"init_lora_weights": "mica"}, "freezes one of the two factors"),
        ({"init_lora_weights": "pissa_niter_0"}, "number of iterations"),
        ({"init_lora_weights": "pisa"}, "olora"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "an even r"),
        ({"init_lora_weights": "pissa", "r": 33}, "r up to 32"),
        ({"init_lora_weights": "pissa", "target_modules": ["word_embeddings"]}, "no start for an embedding"),
    ],
)
def test_a_start_that_cannot_be_had_is_refused_with_the_reason(options: dict[str, Any], said: str) -> None:
    model = tiny.model("bert")
    before, modules = bytes_of(model), dict(model.named_modules())
    with pytest.raises(adapters.RequestError, match=said):
        adapters.adapt(model, "lora", **options)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---------------------------------------------------------------------- rates and unfreezing


def rates_of(trainer: adapters.Trainer) -> dict[str, float]:
    """The learning rate of each parameter, as the optimizer's groups have it."""
    names = {id(parameter): name for name, parameter in trainer.adapted.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("strategy", ["full", "freeze", "bitfit"])
def test_layer_decay_slows_each_block(strategy: str, tmp_path: Path) -> None:
    adapted = adapted_on(strategy=strategy, layer_decay=0.5)
    trainer = trainer_for(tmp_path, adapted, args={"learning_rate": 0.8})
    rates = rates_of(trainer)
    assert set(rates) == set(adapted.trained)
    for name, rate in rates.items():
        block = next((i for i in range(3) if f".layer.{i}." in name), None)
        expected = 0.8 * 0.5 ** (3 - block) if block is not None else 0.05 if "embeddings" in name else 0.8
        assert rate == pytest.approx(expected), name
    assert trainer.optimizer.param_groups[0]["lr"] == 0.8  # the rate that logs show
    decayed = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    wanted = trainer.get_decay_parameter_names(adapted.model)
    assert decayed == {id(p) for n, p in adapted.model.named_parameters() if n in wanted and n in rates}


def test_without_layer_decay_the_groups_are_transformers_own(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, adapted_on(strategy="freeze"), args={"learning_rate": 0.8})
    assert set(rates_of(trainer).values()) == {0.8}
    assert len(trainer.optimizer.param_groups) == 2


def test_the_schedule_keeps_the_rates_apart(tmp_path: Path) -> None:
    adapted = adapted_on(strategy="full", layer_decay=0.5)
    settings = {"learning_rate": 1e-3, "max_steps": 4, "warmup_steps": 0, "save_strategy": "no"}
    trainer = trainer_for(tmp_path, adapted, args=settings, eval_dataset=None)
    trainer.train()
    rates = sorted({group["initial_lr"] for group in trainer.optimizer.param_groups}, reverse=True)
    assert rates == pytest.approx([1e-3, 5e-4, 2.5e-4, 1.25e-4, 6.25e-5])
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged[0] == pytest.approx(1e-3)


class Watch(t.TrainerCallback):
    """The trained tensors at the end of each epoch, and what took gradients in it."""

    def __init__(self, adapted: adapters.Adapted) -> None:
        self.adapted = adapted
        self.states = [{name: tensor.clone() for name, tensor in adapted.state().items()}]
        self.open: list[set[str]] = []

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.open.append({n for n, p in self.adapted.model.named_parameters() if p.requires_grad})
        self.states.append({name: tensor.clone() for name, tensor in self.adapted.state().items()})


def test_gradual_unfreezing_lets_block_after_block_join(tmp_path: Path) -> None:
    adapted = adapted_on(strategy="freeze", layers=3, unfreeze_every=1)
    watch = Watch(adapted)
    settings = {"num_train_epochs": 4, "learning_rate": 1e-2, "warmup_steps": 0, "weight_decay": 0.1}
    trainer = trainer_for(
        tmp_path, adapted, args=settings | {"save_strategy": "no"}, eval_dataset=None, callbacks=[watch]
    )
    trainer.train()
    for epoch, (before, after) in enumerate(zip(watch.states[:-1], watch.states[1:], strict=True)):
        for name in adapted.trained:
            block = next((i for i in range(3) if f".layer.{i}." in name), None)
            joins = 0 if block is None else 3 - block
            assert torch.equal(before[name], after[name]) == (epoch < joins), (epoch, name)
            assert (name in watch.open[epoch]) == (epoch >= joins)
    assert all(p.requires_grad == (n in adapted.trained) for n, p in adapted.model.named_parameters())


def test_without_a_head_the_top_block_begins() -> None:
    net = t.LlamaForCausalLM(tiny.config("llama"))
    strategy = Freeze(layers=2, unfreeze_every=2).resolve(net, frozenset())
    paces = strategy.paces(net, sorted(strategy.apply(net)))
    starts = {block: {p.start for n, p in paces.items() if f"layers.{block}." in n} for block in (1, 2)}
    assert starts == {2: {0}, 1: {2}}
    assert not any(name.rpartition("model.")[2] == "norm.weight" for name in paces)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("cut_at", [2, 3, 4])
def test_interrupted_and_resumed_is_uninterrupted_with_rates_and_unfreezing(
    cut_at: int, accumulation: int, tmp_path: Path
) -> None:
    settings = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "train_sampling_strategy": "random",
    }
    options = {"strategy": "freeze", "layers": 2, "unfreeze_every": 1, "layer_decay": 0.7}
    rows = {"eval_dataset": None, "train_dataset": tiny.rows(16)}  # two steps an epoch
    whole = adapted_on(**options)
    trainer_for(tmp_path / "whole", whole, args=settings, **rows).train()
    cut = adapted_on(**options)
    with pytest.raises(KeyboardInterrupt):
        trainer_for(tmp_path / "cut", cut, args=settings, callbacks=[Cut(cut_at)], **rows).train()
    again = adapted_on(**options)
    trainer_for(tmp_path / "cut", again, args=settings, **rows).train(resume_from_checkpoint=True)
    assert same(again.state(), whole.state())
    # A run that broke off leaves some blocks without gradients; the next one trains them all the same.
    rates = rates_of(trainer_for(tmp_path / "next", cut, args=settings, **rows))
    assert set(rates) == set(cut.trained)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategy": "freeze", "unfreeze_every": 0}, "a whole number > 0"),
        ({"strategy": "freeze", "unfreeze_every": 1.5}, "unfreeze_every"),
        ({"strategy": "freeze", "unfreeze_every": 1, "pattern": "layer.2"}, "Give layers"),
        ({"strategy": "freeze", "layer_decay": 0}, "above 0, up to 1"),
        ({"strategy": "full", "layer_decay": 1.2}, "above 0, up to 1"),
        ({"strategy": "bitfit", "layer_decay": "slow"}, "layer_decay"),
        ({"strategy": "lora", "layer_decay": 0.9}, "unknown option 'layer_decay'"),
        ({"strategy": "full", "kind": "albert", "layer_decay": 0.9}, "share one set of weights"),
    ],
)
def test_rates_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(adapters.RequestError, match=said):
        adapted_on(**options)


def test_a_run_that_cannot_keep_the_pace_is_refused(tmp_path: Path) -> None:
    adapted = adapted_on(strategy="freeze", layers=3, unfreeze_every=2)
    with pytest.raises(adapters.RequestError, match="more than 6 epochs; found 6"):
        trainer_for(tmp_path, adapted, args={"num_train_epochs": 6})
    trainer_for(tmp_path, adapted, args={"num_train_epochs": 7})
    own = torch.optim.SGD([p for p in adapted.model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(adapters.RequestError, match="own groups and rates"):
        trainer_for(tmp_path, adapted, args={"num_train_epochs": 7}, optimizers=(own, None))


def test_an_optimizer_that_does_not_hold_a_parameter_takes_no_rate_for_it() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.1)
    with pytest.raises(adapters.RequestError, match="takes no rate for each parameter"):
        pace.set_rates(optimizer, net, {"1.weight": pace.Pace(factor=0.5)})


# ---------------------------------------------------------------------- module graphs

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VOCABULARY = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 3}
T5 = {
    "decoder_start_token_id": 0,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
}
GRAPHS: dict[str, tuple[Callable[[], Any], bool, set[str], int]] = {
    # name: model, whether it has a task's head, the saved targets, how many modules they are
    "vit": (
        lambda: t.ViTForImageClassification(t.ViTConfig(**SIZES, image_size=16, patch_size=8)),
        True,
        {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"},
        12,
    ),
    "t5": (
        lambda: t.T5ForConditionalGeneration(t.T5Config(**VOCABULARY | T5)),
        False,
        {"q", "k", "v", "o", "wi", "wo"},
        2 * (4 + 2) + 3 * (4 + 4 + 2),
    ),
    "t5-classifier": (
        lambda: t.T5ForSequenceClassification(t.T5Config(**VOCABULARY | T5)),
        True,
        {"q", "k", "v", "o", "wi", "wo"},
        2 * (4 + 2) + 3 * (4 + 4 + 2),
    ),
    "bart": (
        lambda: t.BartForConditionalGeneration(t.BartConfig(**VOCABULARY | BART)),
        False,
        {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
        2 * (4 + 2) + 2 * (4 + 4 + 2),
    ),
    # The head has an out_proj as well, which must stay out.
    "bart-classifier": (
        lambda: t.BartForSequenceClassification(t.BartConfig(**VOCABULARY | BART)),
        True,
        {"q_proj", "k_proj", "v_proj", "self_attn.out_proj", "encoder_attn.out_proj", "fc1", "fc2"},
        2 * (4 + 2) + 2 * (4 + 4 + 2),
    ),
    "roberta-classifier": (
        lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**VOCABULARY | SIZES)),
        True,
        {"query", "key", "value", "output.dense", "intermediate.dense"},
        12,
    ),
    "llama": (
        lambda: t.LlamaForCausalLM(t.LlamaConfig(**VOCABULARY | SIZES)),
        False,
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        14,
    ),
    "gpt2": (
        lambda: t.GPT2LMHeadModel(t.GPT2Config(**VOCABULARY, n_embd=32, n_layer=2, n_head=4)),
        False,
        {"c_attn", "c_proj", "c_fc"},
        8,
    ),
    "mixtral": (
        lambda: t.MixtralForCausalLM(t.MixtralConfig(**VOCABULARY | SIZES, num_key_value_heads=2, num_local_experts=4)),
        False,
        {"q_proj", "k_proj", "v_proj", "o_proj"},
        8,
    ),
}


def built(name: str) -> tuple[Any, frozenset[str]]:
    make, has_head, _, _ = GRAPHS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    return model, frozenset(outside_backbone(model)) if has_head else frozenset()


def answers(name: str, model: Any) -> torch.Tensor:
    inputs: dict[str, Any] = tiny.batch()
    if name == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    elif name in ("t5", "bart"):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    elif "classifier" in name:  # encoder-decoders read the last end of text
        inputs["input_ids"][:, 4] = 3
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", GRAPHS)
def test_loras_saved_targets_name_the_blocks_linear_maps_and_nothing_else(name: str) -> None:
    import peft

    _, _, targets, count = GRAPHS[name]
    model, head = built(name)
    strategy = Lora().resolve(skeleton(model), head)
    assert set(strategy.target_modules) == targets
    assert len(strategy.modules) == count
    theirs, _ = built(name)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=list(strategy.target_modules)), theirs)
    wrapped = {path for path, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert wrapped == set(strategy.modules)


STRATEGIES = [
    Lora(),
    Lora(init_lora_weights="pissa", r=4),
    Full(),
    Freeze(layers=1),
    BitFit(),
    Peft({"peft_type": "IA3"}),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{s.name}-{getattr(s, 'r', '')}")
@pytest.mark.parametrize("name", GRAPHS)
def test_a_strategy_trains_merges_and_strips_on_every_graph(name: str, strategy: Any) -> None:
    model, head = built(name)
    biases = {n for n, _ in model.named_parameters() if n.endswith("bias")} - head
    if strategy.name == "bitfit" and not biases:
        with pytest.raises(adapters.RequestError, match="no biases"):
            strategy.resolve(model, head)
        return
    modules, before = dict(model.named_modules()), bytes_of(model)
    strategy = strategy.resolve(skeleton(model), head)
    trained = set(strategy.apply(model)) | {n for n, _ in model.named_parameters() if own_name(n) in head}
    strategy.begin(model)
    assert trained
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for number, n in enumerate(sorted(trained)):
            noise = torch.randn(parameters[n].shape, generator=torch.Generator().manual_seed(number))
            parameters[n].add_(0.05 * noise)
    wanted = answers(name, model)
    state = {strategy.key(n): parameters[n].detach().clone() for n in trained}
    edits = strategy.edits(state)
    strategy.strip(model)
    assert dict(model.named_modules()) == modules
    assert set(edits) <= set(before)
    frozen = {n: tensor for n, tensor in before.items() if n not in edits}
    assert all(torch.equal(model.state_dict()[n], tensor) for n, tensor in frozen.items() if not tied(model, n, edits))
    with torch.no_grad():
        for n, edit in edits.items():
            target = dict(model.named_parameters())[n]
            target.copy_(edit(before[n]))
    assert float((answers(name, model) - wanted).abs().max()) <= 1e-4 * max(1.0, float(wanted.abs().max()))


def tied(model: Any, name: str, edits: Any) -> bool:
    """Whether a tensor is another name of one that was edited."""
    state = model.state_dict()
    return any(state[other].data_ptr() == state[name].data_ptr() for other in edits if other in state)


@pytest.mark.parametrize("name", [name for name, (_, has_head, _, _) in GRAPHS.items() if not has_head])
def test_a_probe_without_a_head_says_what_to_take(name: str) -> None:
    model, head = built(name)
    with pytest.raises(adapters.RequestError, match=rf"no head to train.*{type(model).__name__}.*Take 'lora'"):
        Probe().resolve(model, head)


@pytest.mark.parametrize("name", GRAPHS)
def test_distances_from_the_head(name: str) -> None:
    model, head = built(name)
    far = pace.distances(model)
    assert set(far) == {n for n, _ in model.named_parameters()}
    assert all(far[n] == 0 for n in head)
    depth = 3 if name.startswith("t5") else 2
    for n, distance in far.items():
        parts = n.split(".")
        numbers = [int(part) for part in parts if part.isdigit()]
        stack = 2 if "encoder" in parts else depth
        if numbers:
            assert distance == stack - numbers[0], n
        elif "embed" in n or n.startswith(("shared", "model.shared", "transformer.shared", "transformer.w")):
            assert distance == depth + 1, n
        else:
            assert distance == 0, n
