"""What training did to one tensor, against a float64 reference and against peft's own merge."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.edits import AddLowRank, Blend, Edit, MergeLayer, Replace, blend, replace_all
from adapters.errors import AdaptersError, RequestError

IN, OUT, RANK = 24, 40, 4
PATH = "encoder.layer.0.output.dense"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---------------------------------------------------------------------- replace


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_trained_tensor_takes_the_place_of_the_old_one(dtype: torch.dtype) -> None:
    new = drawn(3, 5, dtype=dtype)
    for old in (drawn(3, 5, seed=1), None):
        found = Replace(new)(old)
        assert found.dtype == torch.float32
        assert torch.equal(found.to(dtype), new)


def test_a_trained_tensor_of_another_shape_is_refused() -> None:
    with pytest.raises(RequestError, match=r"expected shape \(5, 3\); found shape \(3, 5\)"):
        Replace(drawn(3, 5))(drawn(5, 3))


def test_every_tensor_of_a_state_is_replaced_under_its_own_name() -> None:
    state = {"one": drawn(2, 2), "two": drawn(3)}
    edits = replace_all(state)
    assert set(edits) == set(state)
    for name, edit in edits.items():
        assert torch.equal(edit(None), state[name])


# ---------------------------------------------------------------------- low rank


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True], ids=["(out, in)", "(in, out)"])
@pytest.mark.parametrize(("rank", "scale"), [(1, 1.0), (RANK, 2.0), (16, 16 / 16**0.5)])
def test_a_low_rank_update_equals_its_float64_reference(
    dtype: torch.dtype, transposed: bool, rank: int, scale: float
) -> None:
    down, up = drawn(rank, IN, seed=1, dtype=dtype), drawn(OUT, rank, seed=2, dtype=dtype)
    old = drawn(*((IN, OUT) if transposed else (OUT, IN)), seed=3, dtype=dtype)
    before = old.clone()
    product = scale * up.double() @ down.double()
    wanted = old.double() + (product.T if transposed else product)
    found = AddLowRank(down, up, scale, transposed)(old)
    assert found.dtype == torch.float32
    assert found.shape == old.shape
    assert float((found.double() - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert torch.equal(old, before)


def test_a_square_weight_is_never_guessed_to_be_transposed() -> None:
    down, up, old = drawn(RANK, IN, seed=1), drawn(IN, RANK, seed=2), torch.zeros(IN, IN)
    plain, turned = (AddLowRank(down, up, 1.0, transposed)(old) for transposed in (False, True))
    assert torch.equal(plain, turned.T)
    assert not torch.allclose(plain, turned)


def test_a_factor_that_is_zero_leaves_every_bit() -> None:
    old = drawn(OUT, IN)
    assert torch.equal(AddLowRank(drawn(RANK, IN), torch.zeros(OUT, RANK), 2.0)(old), old)


@pytest.mark.parametrize("old", [None, torch.zeros(IN, OUT)], ids=["no tensor", "another shape"])
def test_a_low_rank_update_that_does_not_fit_is_refused(old: Tensor | None) -> None:
    with pytest.raises(RequestError, match=rf"expected shape \({OUT}, {IN}\)"):
        AddLowRank(drawn(RANK, IN), drawn(OUT, RANK), 1.0)(old)


# ---------------------------------------------------------------------- peft's own merge


def tree(leaf: nn.Module) -> nn.Module:
    """A module tree in which `leaf` stands at PATH."""
    *parents, last = PATH.split(".")
    root = here = nn.Module()
    for name in parents:
        child = nn.Module()
        here.add_module(name, child)
        here = child
    here.add_module(last, leaf)
    return root


CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (peft.LoraConfig, {"r": RANK, "lora_alpha": 8}),
    "rslora": (peft.LoraConfig, {"r": RANK, "lora_alpha": 8, "use_rslora": True}),
    "dora": (peft.LoraConfig, {"r": RANK, "lora_alpha": 8, "use_dora": True}),
    "dora with rslora": (peft.LoraConfig, {"r": RANK, "lora_alpha": 8, "use_dora": True, "use_rslora": True}),
    "lora with a bias": (peft.LoraConfig, {"r": RANK, "lora_alpha": 8, "lora_bias": True}),
    "rank pattern": (peft.LoraConfig, {"r": 2, "rank_pattern": {"output.dense": 5}, "alpha_pattern": {"dense": 3}}),
    "ia3": (peft.IA3Config, {"feedforward_modules": []}),
    "ia3 on inputs": (peft.IA3Config, {"feedforward_modules": ["output.dense"]}),
    "loha": (peft.LoHaConfig, {"r": RANK, "alpha": 8}),
    "lokr": (peft.LoKrConfig, {"r": RANK, "alpha": 8}),
}
CELLS = [
    (name, kind)
    for name in CONFIGS
    for kind in ("Linear", "Linear without bias", "Conv1D")
    if not (kind == "Conv1D" and name in ("loha", "lokr"))  # peft itself refuses these on Conv1D
    and not (kind == "Linear without bias" and name == "lora with a bias")
]


def leaf(kind: str) -> nn.Module:
    made: nn.Module = Conv1D(OUT, IN) if kind == "Conv1D" else nn.Linear(IN, OUT, bias=kind == "Linear")
    with torch.no_grad():
        for seed, parameter in enumerate(made.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=seed))
    return made


def injected(name: str, kind: str) -> tuple[Any, Any, dict[str, Tensor], dict[str, Tensor]]:
    """A peft layer with random tensors; its config, its tensors by inner name, the weights that it stands on."""
    made = leaf(kind)
    old = {part: parameter.detach().clone() for part, parameter in made.named_parameters()}
    kind_of_config, options = CONFIGS[name]
    config = kind_of_config(target_modules=["output.dense"], **options)
    if "fan_in_fan_out" in config.__dataclass_fields__:
        config.fan_in_fan_out = kind == "Conv1D"
    root = tree(made)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peft.inject_adapter_in_model(config, root)
    layer: Any = root.get_submodule(PATH)
    tensors = {}
    with torch.no_grad():
        for seed, (inner, parameter) in enumerate(layer.named_parameters()):
            if not inner.startswith("base_layer."):
                parameter.add_(0.3 * drawn(*parameter.shape, seed=100 + seed))
                tensors[inner.replace(".default", "")] = parameter.detach().clone()
    assert tensors
    return layer, config, tensors, old


def edit_of(config: Any, tensors: dict[str, Tensor], old: dict[str, Tensor], part: str, kind: str) -> MergeLayer:
    return MergeLayer(config, PATH, tensors, part, kind == "Conv1D", (IN, OUT), "bias" in old)


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_one_layer_merges_as_peft_merges_it(name: str, kind: str) -> None:
    layer, config, tensors, old = injected(name, kind)
    layer.eval()
    inputs = drawn(7, IN, seed=50)
    with torch.no_grad():
        adapted = layer(inputs)
        bare = layer.get_base_layer()(inputs)
    merged = {part: edit_of(config, tensors, old, part, kind)(tensor) for part, tensor in old.items()}
    layer.merge()
    for part, tensor in merged.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, layer.get_base_layer().get_parameter(part)), part
    weight = merged["weight"].T if kind == "Conv1D" else merged["weight"]
    answers = nn.functional.linear(inputs, weight, merged.get("bias"))
    assert float((adapted - bare).abs().max()) > 0.1  # the adapter does something
    assert float((answers - adapted).abs().max()) <= 1e-4 * float(adapted.abs().max())


def test_patterns_for_other_modules_are_left_out_in_silence(recwarn: pytest.WarningsRecorder) -> None:
    """peft says of each layer that a pattern for another one was ignored."""
    _, config, tensors, old = injected("rank pattern", "Linear")
    config.rank_pattern = {**config.rank_pattern, "query": 3}
    config.alpha_pattern = {"key|value": 5.0, **config.alpha_pattern}
    recwarn.clear()
    merged = edit_of(config, tensors, old, "weight", "Linear")(old["weight"])
    assert not [str(found.message) for found in recwarn if "pattern" in str(found.message)]
    plain = injected("rank pattern", "Linear")[1]
    assert torch.equal(merged, edit_of(plain, tensors, old, "weight", "Linear")(old["weight"]))


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("name", ["lora", "rslora"])
def test_the_fast_form_of_lora_equals_pefts_merge(name: str, kind: str) -> None:
    _, config, tensors, old = injected(name, kind)
    scale = 8 / RANK**0.5 if name == "rslora" else 8 / RANK
    fast = AddLowRank(tensors["lora_A.weight"], tensors["lora_B.weight"], scale, kind == "Conv1D")(old["weight"])
    slow = edit_of(config, tensors, old, "weight", kind)(old["weight"])
    assert float((fast - slow).abs().max()) <= 1e-6 * float(slow.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_in_half_precision_is_merged_in_float32(dtype: torch.dtype) -> None:
    _, config, tensors, old = injected("dora", "Linear")
    coarse = {part: tensor.to(dtype) for part, tensor in old.items()}
    found = edit_of(config, tensors, coarse, "weight", "Linear")(coarse["weight"])
    wanted = edit_of(config, tensors, old, "weight", "Linear")(coarse["weight"].float())
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


def test_a_merge_draws_no_random_numbers_and_changes_nothing_it_was_given() -> None:
    _, config, tensors, old = injected("dora", "Linear")
    before = {name: tensor.clone() for name, tensor in (tensors | old).items()}
    options = config.to_dict()
    state = torch.get_rng_state()
    for part, tensor in old.items():
        edit_of(config, tensors, old, part, "Linear")(tensor)
    assert torch.equal(torch.get_rng_state(), state)
    assert config.to_dict() == options
    for name, tensor in (tensors | old).items():
        assert torch.equal(tensor, before[name]), name


def test_a_peft_layer_cannot_create_a_weight() -> None:
    _, config, tensors, old = injected("ia3", "Linear")
    with pytest.raises(RequestError, match=rf"{PATH}\.weight"):
        edit_of(config, tensors, old, "weight", "Linear")(None)


@pytest.mark.parametrize("name", ["dora", "ia3"])
def test_a_peft_layer_without_one_of_its_tensors_is_refused(name: str) -> None:
    _, config, tensors, old = injected(name, "Linear")
    for missing in tensors:
        rest = {inner: tensor for inner, tensor in tensors.items() if inner != missing}
        with pytest.raises(AdaptersError, match=missing):
            edit_of(config, rest, old, "weight", "Linear")(old["weight"])


def test_a_peft_layer_with_a_tensor_that_is_not_its_own_is_refused() -> None:
    _, config, tensors, old = injected("dora", "Linear")
    with pytest.raises(AdaptersError, match="lora_C"):
        edit_of(config, tensors | {"lora_C.weight": drawn(2, 2)}, old, "weight", "Linear")(old["weight"])


# ---------------------------------------------------------------------- blends


def low_rank(seed: int) -> AddLowRank:
    return AddLowRank(drawn(RANK, IN, seed=seed), drawn(OUT, RANK, seed=seed + 1), 1.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_adapter_at_weight_one_is_itself_bit_for_bit(dtype: torch.dtype) -> None:
    old = drawn(OUT, IN, dtype=dtype)
    _, config, tensors, base = injected("dora", "Linear")
    merged = edit_of(config, tensors, base, "weight", "Linear")
    edits: list[Edit] = [low_rank(1), Replace(drawn(OUT, IN, seed=9)), merged]
    for edit in edits:
        assert torch.equal(Blend([(1.0, edit)])(old), edit(old))
        assert torch.equal(blend([(1.0, {"w": edit})])["w"](old), edit(old))


def test_adapters_add_up_each_at_its_weight() -> None:
    old = drawn(OUT, IN)
    one, two = low_rank(1), low_rank(5)
    wanted = old.double() + 0.25 * one.delta().double() + 2.0 * two.delta().double()
    for parts in ([(0.25, one), (2.0, two)], [(2.0, two), (0.25, one)]):
        assert float((Blend(parts)(old).double() - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_weight_zero_leaves_every_bit_and_opposite_weights_cancel() -> None:
    old = drawn(OUT, IN)
    assert torch.equal(Blend([(0.0, low_rank(1))])(old), old)
    assert torch.allclose(Blend([(1.0, low_rank(1)), (-1.0, low_rank(1))])(old), old, atol=1e-5)


def test_a_blend_covers_the_tensors_of_every_adapter() -> None:
    old = drawn(OUT, IN)
    one, two = low_rank(1), low_rank(5)
    edits = blend([(1.0, {"both": one, "first": one}), (0.5, {"both": two, "second": two})])
    assert set(edits) == {"both", "first", "second"}
    assert torch.equal(edits["first"](old), one(old))
    assert torch.allclose(edits["second"](old), old + 0.5 * two.delta(), atol=1e-5)
    assert torch.allclose(edits["both"](old), old + one.delta() + 0.5 * two.delta(), atol=1e-5)


def test_tensors_that_an_adapter_creates_cannot_be_blended() -> None:
    with pytest.raises(RequestError, match="new heads"):
        Blend([(0.5, Replace(drawn(3))), (0.5, Replace(drawn(3, seed=1)))])(None)
