"""Experts that memory holds as one tensor of three axes: Mixtral's, Qwen's, Granite's, gpt-oss's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_combine import ties_by_hand

import adapters
from adapters import arithmetic, inspection, manifest, rewrite, shards
from adapters.arithmetic import METHODS, Term, seeded

CAUSAL = "AutoModelForCausalLM"
MIXTURE = tiny.GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = tiny.GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CONFIGS = {
    "mixtral": MIXTURE,  # each expert's matrices lie apart in the checkpoint
    "qwen2_moe": ROUTED | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": ROUTED | {"head_dim": 8},
    "granitemoe": MIXTURE,  # the stacks lie whole
    "gpt_oss": MIXTURE | {"head_dim": 8, "layer_types": ["full_attention"] * 3},  # whole, and (experts, in, out)
}


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, config in CONFIGS.items():
        monkeypatch.setitem(tiny.CONFIGS, kind, config)


def stacks(net: Any) -> list[str]:
    """The names of the stacks of experts."""
    return [name for name, parameter in net.named_parameters() if parameter.ndim == 3]


def opened(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def moved(place: Path, kind: str, name: str, seed: int, scale: float = 0.05) -> Path:
    """A delta over a backbone on disk: experts of the second block have moved, each as far as its number."""
    if not (place / "base").exists():
        tiny.folder(kind, place / "base", auto=CAUSAL)
    net = opened(place / "base")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for stack in [found for found in stacks(net) if ".1." in found]:
            for expert in range(seed % 2, 4):
                matrix = net.get_parameter(stack)[expert]
                matrix.add_((1 + expert) * scale * torch.randn(matrix.shape, generator=generator))
    net.save_pretrained(place / f"tuned-{name}")
    adapters.extract(place / f"tuned-{name}", place / name, base=place / "base", form="delta", check_logits=False)
    return place / name


# ---------------------------------------------------------------------- ties, dare and della


def matrices(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, its stacks in matrices, float64."""
    found: dict[str, torch.Tensor] = {}
    for name, slot in shards.read_directory(folder).items():
        tensor = shards.read_tensor(slot).double()
        if tensor.ndim == 3:
            found |= {f"{name}.{entry}": matrix for entry, matrix in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def drawn_for(disk: str) -> tuple[str, str]:
    """Of a matrix as the checkpoint names it: which stack it belongs to in memory, and what its draws hang on."""
    whole, _, last = disk.rpartition(".")
    if last.isdigit():  # a stack that lies whole
        for disk_name, name in (("input_linear.weight", "gate_up_proj"), ("output_linear.weight", "down_proj")):
            whole = whole.replace(disk_name, f"experts.{name}")
        return whole, f"{last}.0"
    stack, _, rest = disk.partition(".experts.")
    expert, kind, _ = rest.split(".")
    fused = "down_proj" if kind == "w2" else "gate_up_proj"
    return f"{stack.replace('block_sparse_moe', 'mlp')}.experts.{fused}", f"{expert}.{48 if kind == 'w3' else 0}"


@pytest.mark.parametrize("kind", ["mixtral", "granitemoe", "gpt_oss"])
@pytest.mark.parametrize("method", ["ties", "dare", "della"])
def test_each_matrix_of_an_expert_is_a_tensor_of_its_own(tmp_path: Path, kind: str, method: str) -> None:
    folders = [moved(tmp_path, kind, name, seed) for name, seed in (("one", 1), ("two", 2))]
    weights: dict[str | Path, float] = dict(zip(folders, (0.75, 0.5), strict=True))
    report = adapters.combine(weights, tmp_path / "merged", method=method, density=0.4, seed=3, merged=True)
    assert report.logits_checked
    base, one, two, merged = (matrices(tmp_path / name) for name in ("base", "tuned-one", "tuned-two", "merged"))
    digests = [manifest.read_manifest(folder)["files"][manifest.WEIGHTS]["sha256"] for folder in folders]
    changed = [name for name in base if not torch.equal(base[name], merged[name])]
    assert changed
    second = {name for name in stacks(opened(tmp_path / "base")) if ".1." in name}
    assert {drawn_for(name)[0] for name in changed} == second
    for name in changed:
        there = [(w, new[name] - base[name], d) for w, new, d in zip((0.75, 0.5), (one, two), digests, strict=True)]
        if method == "ties":
            wanted = ties_by_hand([delta for _, delta, _ in there], [w for w, _, _ in there], 0.4).double()
        else:
            stack, place = drawn_for(name)
            terms = [Term(w, delta, seeded(seeded(3, digest, stack), place)) for w, delta, digest in there]
            wanted = METHODS[method](terms, 0.4, 1.25)
        torch.testing.assert_close(merged[name], base[name] + wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "granitemoe"])
def test_an_adapter_of_experts_is_what_the_merge_is(tmp_path: Path, kind: str) -> None:
    weights: dict[str | Path, float] = {moved(tmp_path, kind, f"moved-{seed}", seed): 0.5 for seed in (1, 2)}
    for method in ("ties", "dare", "della"):
        adapters.combine(weights, tmp_path / "both", method=method)
        adapters.combine(weights, tmp_path / "merged", method=method, merged=True, check_logits=False)
        both, merged = adapters.load(tmp_path / "both").model, opened(tmp_path / "merged")
        for stack in stacks(merged):
            assert torch.equal(both.get_parameter(stack), merged.get_parameter(stack))


@pytest.mark.parametrize("kind", ["mixtral", "granitemoe"])
def test_one_adapter_of_experts_at_weight_1_is_itself(tmp_path: Path, kind: str) -> None:
    one = moved(tmp_path, kind, "one", 1)
    for method in ("ties", "dare", "della"):
        report = adapters.combine({one: 1.0}, tmp_path / "merged", method=method, density=1.0, merged=True)
        assert report.itself
        assert (report.max_difference, report.logits_checked) == (0.0, True)
        tuned, merged = matrices(tmp_path / "tuned-one"), matrices(tmp_path / "merged")
        assert all(torch.equal(tuned[name], merged[name]) for name in tuned)


@pytest.mark.parametrize(("kind", "most"), [("mixtral", 48 * 32), ("granitemoe", 96 * 32)])
def test_a_merge_thins_one_matrix_at_a_time(
    tmp_path: Path, kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: dict[str | Path, float] = {moved(tmp_path, kind, f"moved-{seed}", seed): 0.5 for seed in (1, 2)}
    sizes, whole = [], arithmetic.trim

    def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
        sizes.append(delta.numel())
        return whole(delta, density)

    monkeypatch.setattr(arithmetic, "trim", trim)
    rewritten, old = [], rewrite._result

    def result(tensor: torch.Tensor, *rest: Any) -> Any:
        rewritten.append(tensor.numel())
        return old(tensor, *rest)

    monkeypatch.setattr(rewrite, "PIECE", 1 << 10)
    monkeypatch.setattr(rewrite, "_result", result)
    adapters.combine(weights, tmp_path / "merged", method="ties", merged=True, check_logits=False)
    assert max(sizes) == most
    assert max(rewritten) == most


# ---------------------------------------------------------------------- LoRA beside stacks


Made = tuple[Any, Path, Any]  # what was adapted, its folder, its logits


def adapted_of(place: Path, kind: str, name: str = "adapter", seed: int = 1, **options: Any) -> Made:
    """A saved language model's LoRA that does something, on a backbone on disk."""
    if not (place / "base").exists():
        tiny.folder(kind, place / "base", auto=CAUSAL)
    options = {"r": 2, "lora_alpha": 4, "target_parameters": "all-experts"} | options
    made = adapters.adapt(str(place / "base"), "lora", task="causal-lm", **options)
    tiny.shake(made, scale=0.1, seed=seed)
    return made, adapters.save(made, place / name), tiny.logits(made.model)


def apart(one: Any, logits: Any) -> float:
    return float((tiny.logits(one) - logits).abs().max())


def by_hand(folder: Path, scale: float = 2.0) -> dict[str, torch.Tensor]:
    """The changes of stacks from peft's tensors, float64, with peft's own equation (experts, out, in)."""
    from safetensors.torch import load_file

    tensors = {name: tensor.double() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    found = {}
    for key, down in tensors.items():
        layer, _, rest = key.partition(".lora_A")
        path = layer.removeprefix("base_model.model.")
        if not rest or ".experts" not in path:
            continue
        up = tensors[f"{layer}.lora_B.weight"]
        # The layer of `down_proj`, which the module holds last, stands around that of `gate_up_proj`.
        name = path.replace(".base_layer", ".gate_up_proj") if ".base_layer" in path else f"{path}.down_proj"
        found[name] = scale * torch.einsum("ore,eri->eoi", up.view(len(up), -1, 4), down.view(4, -1, down.shape[1]))
    return found


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An adapter of each family, made once."""
    root, made = tmp_path_factory.mktemp("experts"), dict[str, Made]()

    def of(kind: str) -> tuple[Path, Made]:
        if kind not in made:
            made[kind] = adapted_of(root / kind, kind)
        return root / kind, made[kind]

    return of


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_names_are_the_backbones_own_and_nothing_is_left(kind: str, tmp_path: Path) -> None:
    tiny.folder(kind, tmp_path / "base", auto=CAUSAL)
    net = opened(tmp_path / "base")
    before, bytes_before = list(net.named_parameters()), {n: p.clone() for n, p in net.named_parameters()}
    modules = dict(net.named_modules())
    processor = tiny.processor(kind)
    made = adapters.adapt(net, "lora", task="causal-lm", target_parameters="all-experts", r=2, processor=processor)
    plain = adapters.adapt(opened(tmp_path / "base"), "lora", task="causal-lm", processor=processor)
    assert set(made.fingerprint.tensors) == set(plain.fingerprint.tensors)
    assert made.fingerprint.digest == plain.fingerprint.digest
    assert set(made.strategy.stacks) == set(stacks(opened(tmp_path / "base")))  # type: ignore[attr-defined]
    assert set(made.strategy.edits(made.state())) <= {name for name, _ in before}
    assert apart(net, tiny.logits(plain.model)) == 0  # B is zero
    tiny.shake(made)
    assert apart(net, tiny.logits(plain.model)) > 1e-4
    with adapters.disabled(made) as bare:
        assert apart(bare, tiny.logits(plain.model)) == 0
    made.strategy.strip(net)
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in before]
    assert all(one is two for (_, one), (_, two) in zip(net.named_parameters(), before, strict=True))
    assert dict(net.named_modules()) == modules
    assert all(torch.equal(parameter, bytes_before[name]) for name, parameter in before)
    assert not any("order" in name for module in net.modules() for name in vars(module) if "before" in name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapted_loaded_merged_and_opened_by_peft_it_answers_alike(kind: str, kept: Any, tmp_path: Path) -> None:
    import peft

    place, (made, folder, logits) = kept(kind)
    again = adapters.load(folder)
    assert apart(again.model, logits) == 0
    assert again.strategy == made.strategy
    assert apart(peft.PeftModel.from_pretrained(opened(place / "base"), folder), logits) == 0
    report = adapters.merge_on_disk(folder, tmp_path / "merged")
    assert report.logits_checked
    on_disk = opened(tmp_path / "merged")
    assert apart(on_disk, logits) < 1e-5
    changes_by_hand = by_hand(folder)
    base = dict(opened(place / "base").named_parameters())
    in_memory = dict(adapters.merge(again).named_parameters())
    for name, parameter in on_disk.named_parameters():
        torch.testing.assert_close(in_memory[name], parameter, atol=1e-7, rtol=1e-6)
        if name in changes_by_hand:
            delta = changes_by_hand[name].transpose(1, 2) if kind == "gpt_oss" else changes_by_hand[name]
            assert float(delta.abs().max()) > 1e-3
            torch.testing.assert_close(parameter.double(), base[name].double() + delta, atol=1e-6, rtol=1e-6)
    assert set(changes_by_hand) == set(stacks(on_disk))


@pytest.mark.parametrize(
    "options",
    [
        {"target_parameters": ["down_proj"], "target_modules": [], "layers_to_transform": [1]},
        {"target_parameters": ["mlp.experts.gate_up_proj"], "use_rslora": True, "init_lora_weights": "gaussian"},
        {
            "target_parameters": ["gate_up_proj", "experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 3, ".*1.mlp.experts.gate_up_proj": 1},
            "alpha_pattern": {"gate_up_proj": 5.0},
        },
        {
            "target_parameters": ["down_proj"],
            "unfrozen_parameters": ["norm", "gate_up"],
            "init_lora_weights": False,
        },
    ],
    ids=["one block", "rslora", "patterns", "beside whole tensors"],
)
def test_options_mean_what_peft_means(options: dict[str, Any], tmp_path: Path) -> None:
    import peft

    made, folder, logits = adapted_of(tmp_path, "mixtral", **options)
    again = adapters.load(folder)
    assert apart(again.model, logits) == 0
    assert set(again.trained) == set(made.trained)
    adapters.merge_on_disk(folder, tmp_path / "merged")
    assert apart(opened(tmp_path / "merged"), logits) < 1e-5
    if "unfrozen_parameters" not in options:
        assert apart(peft.PeftModel.from_pretrained(opened(tmp_path / "base"), folder), logits) == 0
    if "layers_to_transform" in options:
        assert {name.split(".layers.")[1][0] for name in made.trained} == {"1"}


def test_our_load_opens_pefts_folder(tmp_path: Path) -> None:
    import peft

    tiny.folder("mixtral", tmp_path / "base", auto=CAUSAL)
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["experts.down_proj", "experts.gate_up_proj"],
        rank_pattern={"experts.down_proj": 4},
    )
    net = peft.get_peft_model(opened(tmp_path / "base"), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in net.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    logits = tiny.logits(net)
    net.save_pretrained(tmp_path / "peft")
    again = adapters.load(tmp_path / "peft", opened(tmp_path / "base"))
    assert apart(again.model, logits) == 0
    config_file = tmp_path / "peft" / "adapter_config.json"
    said = json.loads(config_file.read_text())
    for version in ("0.18.1", "0.19.0.dev0@1a2b", None):
        config_file.write_text(json.dumps(said | {"peft_version": version}))
        with pytest.raises(adapters.FolderError, match=r"the other way round .*expected peft_version 0\.19\.1"):
            adapters.load(tmp_path / "peft", opened(tmp_path / "base"))


def test_a_forward_pass_of_pefts_does_not_change_what_keys_mean(tmp_path: Path) -> None:
    """It moves a tensor to the end of its module, and the order of a module's tensors says which key is whose."""
    import peft

    tiny.folder("mixtral", tmp_path / "base", auto=CAUSAL)
    net = opened(tmp_path / "base")
    first = peft.get_peft_model(net, peft.LoraConfig(target_modules=[], target_parameters=["gate_up_proj"]))
    tiny.logits(first)
    net = first.unload()
    assert [leaf for leaf, _ in net.model.layers[0].mlp.experts.named_parameters()] == ["down_proj", "gate_up_proj"]
    processor = tiny.processor("mixtral")
    options: dict[str, Any] = {"task": "causal-lm", "processor": processor, "target_parameters": "all-experts"}
    made = adapters.adapt(net, "lora", **options)
    tiny.shake(made)
    logits = tiny.logits(made.model)
    folder = adapters.save(made, tmp_path / "adapter")
    assert apart(adapters.load(folder, str(tmp_path / "base")).model, logits) == 0
    assert apart(peft.PeftModel.from_pretrained(opened(tmp_path / "base"), folder), logits) == 0


def test_experts_train_and_a_resumed_run_is_an_uninterrupted_one(tmp_path: Path) -> None:
    rows = [{"text": row["text"]} for row in tiny.rows(32)]
    tiny.folder("mixtral", tmp_path / "base", auto=CAUSAL)

    def run(name: str, steps: int) -> Any:
        made = adapters.adapt(str(tmp_path / "base"), "lora", task="causal-lm", r=2, target_parameters="all-experts")
        settings = {"output_dir": str(tmp_path / name), "max_steps": steps, "save_steps": 2, "learning_rate": 1e-2}
        settings |= {"per_device_train_batch_size": 8, "save_strategy": "steps", "lr_scheduler_type": "constant"}
        trainer = adapters.Trainer(made, settings, rows)
        return trainer, made

    whole, made = run("whole", 4)
    before = {name: tensor.clone() for name, tensor in made.state().items()}
    whole.train()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in made.state().items())
    folder = adapters.save(made, tmp_path / "adapter")
    assert apart(adapters.load(folder).model, tiny.logits(made.model)) == 0
    short, _ = run("short", 4)
    (tmp_path / "short").mkdir(exist_ok=True)

    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "short" / "checkpoint-2")
    short.train(resume_from_checkpoint=True)
    for name, tensor in short.adapted.state().items():
        assert torch.equal(tensor, made.state()[name]), name


def test_a_bf16_backbone(tmp_path: Path) -> None:
    tiny.folder("mixtral", tmp_path / "base", auto=CAUSAL)
    opened(tmp_path / "base").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"task": "causal-lm", "lora_alpha": 4, "target_parameters": "all-experts"}
    made = adapters.adapt(str(tmp_path / "base"), "lora", load={"dtype": "bfloat16"}, **options)
    assert {p.dtype for n, p in made.model.named_parameters() if n in made.trained} == {torch.float32}
    tiny.shake(made)
    folder = adapters.save(made, tmp_path / "adapter")
    assert apart(adapters.load(folder).model, tiny.logits(made.model)) == 0
    report = adapters.merge_on_disk(folder, tmp_path / "merged")
    assert report.logits_checked


def test_experts_pass_a_merge_in_pieces(kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("mixtral", "granitemoe"):
        _, (_, folder, _) = kept(kind)
        sizes, old = [], rewrite._result

        def result(tensor: torch.Tensor, *rest: Any, old: Any = old, sizes: list[int] = sizes) -> Any:
            sizes.append(tensor.numel())
            return old(tensor, *rest)

        monkeypatch.setattr(rewrite, "PIECE", 1 << 12)
        with monkeypatch.context() as patched:
            patched.setattr(rewrite, "_result", result)
            adapters.merge_on_disk(folder, tmp_path / kind, check_logits=False)
        assert max(sizes) == (1 << 12) // 4 if kind == "mixtral" else 96 * 32


# ---------------------------------------------------------------------- what is said and refused


def test_experts_that_stay_frozen_are_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.folder("mixtral", tmp_path / "base", auto=CAUSAL)
    cases: list[tuple[str, dict[str, Any], bool]] = [
        ("lora", {}, True),
        ("ia3", {}, True),
        ("lora", {"target_parameters": ["down_proj"]}, False),
        ("lora", {"unfrozen_parameters": ["experts"]}, False),
        ("freeze", {"layers": 1}, False),
    ]
    for strategy, options, told in cases:
        caplog.clear()
        made = adapters.adapt(str(tmp_path / "base"), strategy, task="causal-lm", **options)
        found = [note for note in made.record.notes if "the experts stay frozen" in note]
        assert len(found) == told
        assert sum("the experts stay frozen" in record.message for record in caplog.records) == told
        if told:
            own = opened(tmp_path / "base").state_dict()
            share = sum(t.numel() for t in own.values() if t.ndim == 3) / sum(t.numel() for t in own.values())
            assert f"6 stacks (experts.down_proj, experts.gate_up_proj) with {100 * share:.0f} % of the" in found[0]
            assert "target_parameters='all-experts'" in found[0]
    again = adapters.load(adapters.save(adapters.adapt(str(tmp_path / "base"), task="causal-lm"), tmp_path / "adapter"))
    assert sum("the experts stay frozen" in note for note in again.record.notes) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_dropout": 0.1}, r"factors of experts do not have \(lora_dropout, with target_parameters\)"),
        ({"use_dora": True}, r"do not have \(use_dora, with target_parameters\)"),
        ({"init_lora_weights": "pissa"}, r"\(init_lora_weights.*expected True, False or \"gaussian\"; found 'pissa'"),
        ({"init_lora_weights": "orthogonal"}, r"\(init_lora_weights"),
        ({"target_parameters": ["down_prj"]}, r"'down_prj' match no stacks of experts .*'experts.down_proj'"),
        (
            {"target_parameters": ["q_proj.weight"]},
            r"'q_proj.weight' is no stack of experts .*by target_modules",
        ),
        ({"target_parameters": ["down_proj"], "layers_to_transform": [3]}, "there is no block 3"),
        ({"unfrozen_parameters": ["down_proj"]}, "a weight cannot be adapted and train whole as well"),
        ({"rank_pattern": {"router": 3}}, "matches none of the adapted modules"),
        ({"target_parameters": 3}, "a wrong value .target_parameters"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_requests_that_cannot_be(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    tiny.folder("mixtral", tmp_path / "base", auto=CAUSAL)
    with pytest.raises(adapters.RequestError, match=said):
        adapters.adapt(
            str(tmp_path / "base"), "lora", task="causal-lm", **{"target_parameters": "all-experts"} | options
        )


def test_a_backbone_without_experts_and_another_strategy_are_refused(tmp_path: Path) -> None:
    import peft

    tiny.folder("llama", tmp_path / "llama", auto=CAUSAL)
    with pytest.raises(adapters.RequestError, match=r"no experts that lie in one tensor .*found LlamaForCausalLM"):
        adapters.adapt(str(tmp_path / "llama"), "lora", task="causal-lm", target_parameters="all-experts")
    tiny.folder("mixtral", tmp_path / "base", auto=CAUSAL)
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["down_proj"], lora_bias=True)
    with pytest.raises(adapters.RequestError, match="factors of experts belong to the strategy 'lora'"):
        adapters.adapt(str(tmp_path / "base"), config, task="causal-lm")


def test_a_plan_counts_what_folding_takes_and_says_what_stays_frozen(tmp_path: Path) -> None:
    tiny.folder("mixtral", tmp_path / "base", auto=CAUSAL, hidden_size=64, intermediate_size=128)
    sizes: dict[str, Any] = {"task": "causal-lm", "length": 8, "batch": 1, "memory": "16GB", "device": "cpu"}
    plain = adapters.plan(str(tmp_path / "base"), ["lora", "ia3"], **sizes)
    assert sum("the experts stay frozen: 6 stacks" in note for note in plain.notes) == 1
    found = adapters.plan(str(tmp_path / "base"), "lora", target_parameters="all-experts", **sizes)
    assert not any("frozen:" in note for note in found.notes)
    stack = 3 * 4 * (64 * 256 + 128 * 64) * 4  # bytes of all stacks: peft's sums with the factors live until backward
    assert found.lines[0].activations - plain.lines[0].activations > 0.9 * stack
    assert found.lines[0].trained > plain.lines[0].trained


# ---------------------------------------------------------------------- names that peft takes for others


def deepseek(place: Path) -> Path:
    """A mixture with dense blocks and shared experts, whose linear maps are called as single experts once were."""
    options = {"n_routed_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "n_group": 1}
    options |= {"topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": None, "kv_lora_rank": 8}
    options |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4}
    tiny.CONFIGS["deepseek_v3"] = tiny.GROUPED | options
    try:
        return Path(tiny.folder("deepseek_v3", place, auto=CAUSAL))
    finally:
        del tiny.CONFIGS["deepseek_v3"]


def test_linear_maps_that_are_called_as_experts_were_are_adapted(tmp_path: Path) -> None:
    base = deepseek(tmp_path / "base")
    made = adapters.adapt(str(base), "lora", task="causal-lm", r=2)
    assert any(".shared_experts.down_proj." in name for name in made.trained)
    assert any("layers.0.mlp.down_proj." in name for name in made.trained)
    tiny.shake(made)
    folder = adapters.save(made, tmp_path / "adapter")
    assert apart(adapters.load(folder).model, tiny.logits(made.model)) == 0
    said = "no adapter_config.json was written: peft takes down_proj, gate_proj, up_proj of DeepseekV3ForCausalLM"
    assert any(said in note for note in adapters.load(folder).record.notes)
    assert not (folder / "adapter_config.json").exists()
    with pytest.raises(adapters.RequestError, match=r"peft takes model\.layers\.0\.mlp\.down_proj"):
        adapters.export(folder, tmp_path / "out", to="peft")
    narrow = adapters.adapt(str(base), "lora", task="causal-lm", r=2, target_modules=["q_proj", "o_proj"])
    assert (adapters.save(narrow, tmp_path / "narrow") / "adapter_config.json").exists()


# ---------------------------------------------------------------------- the work after training


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_are_inspected_and_compared_one_by_one(kind: str, kept: Any, tmp_path: Path) -> None:
    place, (_, folder, _) = kept(kind)
    deltas = by_hand(folder)
    profile = {one.name: one for one in adapters.inspect(folder).tensors}
    assert "stacks" not in inspection.describe(folder)["options"]
    for name, delta in deltas.items():
        for expert, matrix in enumerate(delta):
            one = profile[f"{name}.{expert}"]
            assert one.form == "low rank"
            assert one.norm == pytest.approx(float(matrix.norm()), rel=1e-5)
            assert one.spectrum is not None
            assert one.spectrum.rank == 2
            assert one.base == pytest.approx(float(opened(place / "base").get_parameter(name)[expert].norm()), rel=1e-5)
    if not (place / "other").exists():
        adapted_of(place, kind, "other", seed=5)
    other = by_hand(place / "other")
    found = {one.name: one for one in adapters.diff(folder, place / "other").tensors}
    for name, delta in deltas.items():
        one = found[f"{name}.2"]
        assert one.difference == pytest.approx(float((delta[2] - other[name][2]).norm()), rel=1e-5)
        assert one.overlap is not None
    same = adapters.diff(folder, folder).tensors
    assert {one.difference for one in same} == {0.0}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_sums_stay_factors_expert_by_expert(kind: str, kept: Any, tmp_path: Path) -> None:
    place, (_, folder, _) = kept(kind)
    other = place / "other"
    if not other.exists():
        adapted_of(place, kind, "other", seed=5)
    weights: dict[str | Path, float] = {folder: 0.75, other: -0.5}
    report = adapters.combine(weights, tmp_path / "sum")
    assert (report.stacks, report.whole, report.ranks, report.error) == (6, 0, (4, 4), 0.0)
    one, two, total = by_hand(folder), by_hand(other), by_hand(tmp_path / "sum", scale=1.0)
    for name, delta in total.items():
        torch.testing.assert_close(delta, 0.75 * one[name] - 0.5 * two[name], atol=1e-6, rtol=1e-5)
    assert adapters.combine(weights, tmp_path / "merged", merged=True).logits_checked
    logits = tiny.logits(opened(tmp_path / "merged"))
    assert apart(adapters.load(tmp_path / "sum").model, logits) < 1e-5
    cut = adapters.combine(weights, tmp_path / "cut", rank=3)
    assert cut.ranks == (3, 3)
    lost = by_hand(tmp_path / "cut", scale=1.0)
    name = next(name for name in lost if name in cut.worst) if ".experts." in cut.worst else next(iter(lost))
    for got, whole in zip(lost[name], total[name], strict=True):
        values = torch.linalg.svdvals(whole)
        assert float((got - whole).norm()) == pytest.approx(float(values[3:].norm()), rel=1e-4)
    with pytest.raises(adapters.RequestError, match="a rank above the matrix"):
        adapters.combine(weights, tmp_path / "more", rank=33)
    itself = adapters.combine({folder: 1.0}, tmp_path / "itself")
    assert itself.itself
    ties = adapters.combine(weights, tmp_path / "ties", method="ties", merged=True)
    assert ties.logits_checked


def test_weights_are_found_on_rows(kept: Any, tmp_path: Path) -> None:
    place, (_, folder, _) = kept("mixtral")
    other = place / "other"
    if not other.exists():
        adapted_of(place, "mixtral", "other", seed=5)
    rows = [{"text": row["text"]} for row in tiny.rows(6)]
    weights: dict[str | Path, float] = {folder: 0.5, other: 0.5}
    report = adapters.combine(weights, tmp_path / "found", search=rows, trials=3)
    assert len(report.searched) == 3
    assert report.stacks == 6


@pytest.mark.parametrize("kind", ["mixtral", "granitemoe", "gpt_oss"])
def test_two_checkpoints_become_factors_of_experts(kind: str, kept: Any, tmp_path: Path) -> None:
    place, (_, folder, logits) = kept(kind)
    adapters.merge_on_disk(folder, tmp_path / "tuned", check_logits=False)
    report = adapters.extract(tmp_path / "tuned", tmp_path / "out", base=place / "base", rank=2)
    assert (report.whole, report.ranks) == (0, (2, 2))
    assert report.factors == 6 + 12
    assert report.error < 1e-4
    again = adapters.load(tmp_path / "out")
    assert apart(again.model, logits) < 1e-4
    assert len(again.strategy.stacks) == 6  # type: ignore[attr-defined]
    less = adapters.extract(tmp_path / "tuned", tmp_path / "less", base=place / "base", rank=1, check_logits=False)
    assert 0.05 < less.error < 1
    share = adapters.extract(
        tmp_path / "tuned", tmp_path / "share", base=place / "base", energy=0.9, check_logits=False
    )
    assert 0 < share.error <= 0.1**0.5 + 1e-6
    whole = adapters.extract(tmp_path / "tuned", tmp_path / "whole", base=place / "base", check_logits=False)
    assert whole.whole == 6
    assert "6 stacks of experts had changed and are held whole: a rank or an energy" in " ".join(whole.notes)


def test_the_rank_of_an_adapter_of_experts_is_changed(kept: Any, tmp_path: Path) -> None:
    _, (_, folder, logits) = kept("mixtral")
    same = adapters.extract(folder, tmp_path / "same")
    assert (same.whole, same.ranks) == (0, (2, 2))
    assert apart(adapters.load(tmp_path / "same").model, logits) < 1e-5
    less = adapters.extract(folder, tmp_path / "less", rank=1)
    assert less.ranks == (1, 1)
    with pytest.raises(adapters.RequestError, match="the rank is above that of a matrix"):
        adapters.extract(folder, tmp_path / "more", rank=33)


def test_exports_take_it_or_say_why_not(kept: Any, tmp_path: Path) -> None:
    import peft

    place, (_, folder, logits) = kept("mixtral")
    for target in ("vllm", "tgi", "llama.cpp"):
        with pytest.raises(adapters.RequestError, match=rf"{target} cannot take factors of experts.*experts.down_proj"):
            adapters.export(folder, tmp_path / target, to=target)
        assert not (tmp_path / target).exists()
    with pytest.raises(adapters.RequestError, match="cut to another rank they are not written here"):
        adapters.export(folder, tmp_path / "cut", to="peft", rank=1)
    adapters.export(folder, tmp_path / "peft", to="peft")
    assert apart(adapters.load(tmp_path / "peft", opened(place / "base")).model, logits) == 0
    assert apart(peft.PeftModel.from_pretrained(opened(place / "base"), tmp_path / "peft"), logits) == 0
    adapters.export(folder, tmp_path / "plain", to="transformers")
    assert apart(opened(tmp_path / "plain"), logits) < 1e-5


def test_many_adapters_of_experts_on_one_backbone(kept: Any, tmp_path: Path) -> None:
    place, (_, folder, _) = kept("mixtral")
    other = place / "other"
    if not other.exists():
        adapted_of(place, "mixtral", "other", seed=5)
    texts = [row["text"] for row in tiny.rows(4)]
    shared = adapters.Shared(str(place / "base"))
    for name, where in (("one", folder), ("two", other)):
        shared.load(where, name)
    names = ["one", "two", "two", "one"]
    mixed = adapters.predict(shared, texts, adapter=names)
    alone = {name: adapters.predict(adapters.load(where), texts) for name, where in (("one", folder), ("two", other))}
    assert mixed == [alone[name][row] for row, name in enumerate(names)]
