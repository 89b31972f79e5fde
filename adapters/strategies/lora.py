"""LoRA: frozen weights plus a trained low-rank product (Hu et al., 2021), by peft's layers put in place.

PiSSA and OLoRA start from factors of the weight itself, and peft takes their product out of the backbone. Here the
backbone stays: what is trained is B A - B0 A0, a plain LoRA of twice the rank whose second half, the start, is held.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from adapters import deferred
from adapters.options import RESOLVED, check_types

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.anatomy import LinearMap
    from adapters.edits import Edit
    from adapters.lowrank import Factors, FactorStack
    from adapters.pace import Pace

    Stacks = Mapping[str, FactorStack]

NONE: Mapping[str, Any] = {}  # no stacks of experts
PAIRED = re.compile(r"pissa(_niter_[1-9][0-9]*)?|olora")  # starts that are factors of the weight
STARTS = 'True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_<number of iterations>" or "olora"'
# Why peft's other starts cannot be had.
REFUSED = {
    "eva": "it is computed from the activations of rows that the model has seen first",
    "corda": "it is computed from the activations of rows that the model has seen first",
    "lora_ga": "it is computed from the gradients of rows that the model has seen first",
    "loftq": "it puts quantized weights in the backbone's place",
    "mica": "it freezes one of the two factors, which would then not be saved",
}


def learning_rate(model: PreTrainedModel) -> float:
    """By the model's width: 4e-4 (Hu et al., 2021, for RoBERTa) up to 3070, 3.2e-4 at 4096."""
    return min(4e-4, warm_learning_rate(model))


def warm_learning_rate(model: PreTrainedModel) -> float:
    """The same below a head that starts solved: 1.2e-3 up to 768; beyond, the fit of Schulman et al. (2025)."""
    return float(1.17e-3 * min(1.0, (768 / model.config.get_text_config().hidden_size) ** 0.775))


@final
@dataclass(frozen=True)
class Lora:
    """Low-rank adaptation; the options have peft's names and meanings.

    Attributes:
        r: rank of the update.
        lora_alpha: the update is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with rslora).
        lora_dropout: dropout on the update's input while training.
        target_modules: None or "all-linear" for every linear map inside the blocks, never the head; a list of
            names or dotted suffixes; or one regular expression over whole paths.
            [] for none, where target_parameters names some.
        target_parameters: stacks of experts that get factors, too, a pair for each expert: "all-experts", or a list of
            names or dotted suffixes ("mlp.experts.down_proj"); None for none.
        exclude_modules: what is left out of target_modules, in the same forms.
        layers_to_transform: numbers of the blocks that are adapted, None for all.
        bias: "none", or "lora_only": the adapted modules' biases train too, or "all".
        use_rslora: rank-stabilised scale (Kalajdzievski, 2023).
        use_dora: weight-decomposed update (Liu et al., 2024).
        rank_pattern, alpha_pattern: other r or lora_alpha for modules or stacks whose path ends in a key (a regular
            expression).
        init_lora_weights: True for the standard start (B = 0), False for random factors, "gaussian", "orthogonal"
            (both factors random, their product 0), "pissa" (the largest singular directions, Meng et al., 2024) or
            "pissa_niter_16" (the same, found faster in 16 iterations), or "olora" (a QR decomposition, Buyukakyuz,
            2024). The last three write factors of rank 2 r.
        unfrozen_parameters: regular expressions searched in the backbone's parameter names; what any of them finds
            trains whole beside the factors (layer norms, say). Each must find something.
        modules_to_save: filled on resolving: the head and other modules that train whole.
        modules: filled on resolving: path -> [in, out, transposed, has bias] of each adapted module.
        stacks: filled on resolving: name -> [experts, in, out, transposed, path of peft's layer] of each stack.
    """

    name: ClassVar[str] = "lora"
    defaults: ClassVar[Mapping[str, object]] = {
        "learning_rate": learning_rate,
        "warm_learning_rate": warm_learning_rate,
        # Adam's memory of squared gradients is 20 steps, not 1000. When a run begins to learn, gradients grow up to
        # twentyfold: a long memory makes steps too long meanwhile, and a tenth of that for hundreds of steps after, and
        # a run may come apart (docs/benchmarks.md, "LoRA's learning rate").
        "adam_beta2": 0.95,
        "num_train_epochs": 6,
    }

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: Sequence[str] | str | None = None
    target_parameters: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    layers_to_transform: Sequence[int] | int | None = None
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    init_lora_weights: bool | str = True
    unfrozen_parameters: Sequence[str] = ()
    modules_to_save: Sequence[str] = field(default=(), metadata=RESOLVED)
    modules: Mapping[str, Sequence[Any]] = field(default_factory=dict, metadata=RESOLVED)
    stacks: Mapping[str, Sequence[Any]] = field(default_factory=dict, metadata=RESOLVED)

    def __post_init__(self) -> None:
        if isinstance(self.unfrozen_parameters, str):
            object.__setattr__(self, "unfrozen_parameters", (self.unfrozen_parameters,))
        check_types(self)
        self._check()
        self._check_start()

    def resolve(self, model: PreTrainedModel, head: frozenset[str]) -> Self:
        """Find the target modules in the model's graph and check every option against them.

        Raises:
            RequestError: a value out of range, or a pattern that matches nothing.
        """
        from adapters import experts
        from adapters.anatomy import shortest_suffixes
        from adapters.injection import candidates, check_patterns, choose, layout, whole_modules

        stacks = experts.chosen(model, self.target_parameters, self.layers_to_transform)
        start = self.init_lora_weights
        asked = {
            "lora_dropout": (self.lora_dropout, self.lora_dropout == 0, "0"),
            "use_dora": (self.use_dora, not self.use_dora, "False"),
            "init_lora_weights": (start, isinstance(start, bool) or start == "gaussian", 'True, False or "gaussian"'),
        }
        experts.refuse_options(stacks, asked)
        every_layer, chosen = {}, {}
        if self._adapts_modules or not stacks:
            names: dict[str, Any] = {"patterns": self.target_modules, "exclude": self.exclude_modules}
            every_layer = choose(model, head, **names)
            chosen = choose(model, head, **names, layers=self.layers_to_transform)
        # Named against every other module of the model, so that the saved suffixes cannot catch a head or a pooler.
        others = [path for path, _ in model.named_modules() if path not in every_layer]
        others += [path for path in candidates(model, head) if path not in every_layer]
        for option, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            check_patterns(option, patterns, [*chosen, *stacks])
        self._check_ranks(chosen)
        unfrozen = self._unfrozen(model, {**chosen, **stacks})
        layers = self.layers_to_transform
        beside = [name for name, _ in model.named_parameters() if name not in stacks]
        return replace(
            self,
            target_modules=tuple(shortest_suffixes(every_layer, others)),
            target_parameters=tuple(shortest_suffixes(stacks, beside)) if stacks else None,
            exclude_modules=None,
            layers_to_transform=[layers] if isinstance(layers, int) else None if layers is None else list(layers),
            unfrozen_parameters=tuple(self.unfrozen_parameters),
            modules_to_save=tuple(whole_modules(model, head | unfrozen)),
            modules=layout(chosen),
            stacks={name: stack.to_json() for name, stack in stacks.items()},
        )

    @property
    def _adapts_modules(self) -> bool:
        """Whether any linear map is to be adapted: an empty list says that none is."""
        return self.target_modules is None or len(self.target_modules) > 0

    def _unfrozen(self, model: PreTrainedModel, chosen: Collection[str]) -> set[str]:
        """The parameters that train whole beside the factors, by the backbone's own names.

        Raises:
            RequestError: a pattern that finds nothing, or a weight that is adapted.
        """
        from adapters.anatomy import found_parameters, owner
        from adapters.errors import RequestError, message

        found = found_parameters(model, self.unfrozen_parameters, "unfrozen_parameters")
        both = sorted(n for n in found if n in chosen or (n.endswith(".weight") and owner(n) in chosen))
        if both:
            raise RequestError(
                message(
                    "a weight cannot be adapted and train whole as well",
                    where=f"unfrozen_parameters: {both[0]}",
                    remedy="Take it out of target_modules or target_parameters, or narrow the pattern.",
                )
            )
        return found

    def _check(self) -> None:
        from adapters.errors import RequestError, message

        whole = isinstance(self.r, int) and not isinstance(self.r, bool)
        share = _is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1
        faults = [
            (whole and self.r > 0, "r", "a whole number > 0", self.r),
            (_is_number(self.lora_alpha) and self.lora_alpha > 0, "lora_alpha", "a number > 0", self.lora_alpha),
            (share, "lora_dropout", "a share from 0 to below 1", self.lora_dropout),
            (self.bias in ("none", "all", "lora_only"), "bias", '"none", "all" or "lora_only"', self.bias),
        ]
        wrong = [message("a wrong value", where=w, expected=e, found=repr(f)) for fine, w, e, f in faults if not fine]
        if wrong:
            raise RequestError(*wrong)

    def _check_start(self) -> None:
        from adapters.errors import RequestError, message

        start = self.init_lora_weights
        if isinstance(start, bool) or start in ("gaussian", "orthogonal") or PAIRED.fullmatch(start):
            return
        reason = REFUSED.get(start)
        raise RequestError(
            message(
                f"the start {start!r} cannot be had here: {reason}" if reason else "a wrong value",
                where="init_lora_weights",
                expected=STARTS,
                found=repr(start),
            )
        )

    def _check_ranks(self, chosen: Mapping[str, LinearMap]) -> None:
        """What a start demands of ranks and modules.

        Raises:
            RequestError: naming the module.
        """
        from adapters.errors import RequestError, message
        from adapters.injection import by_pattern

        start = self.init_lora_weights
        for path, module in chosen.items():
            rank = by_pattern(self.rank_pattern, path, self.r)
            where = f"init_lora_weights={start!r}: {path}"
            if start == "orthogonal" and rank % 2:
                raise RequestError(message("an odd rank", where=where, expected="an even r", found=rank))
            if not self._paired:
                continue
            if module.transposed and not module.has_bias:
                raise RequestError(
                    message("no start for an embedding", where=where, remedy="Take init_lora_weights=True.")
                )
            if rank > min(module.shape):
                raise RequestError(
                    message("the rank exceeds the weight's", where=where, expected=f"r up to {min(module.shape)}")
                )

    @property
    def _paired(self) -> bool:
        """Whether the factors at the start are kept beside the trained ones."""
        return isinstance(self.init_lora_weights, str) and PAIRED.fullmatch(self.init_lora_weights) is not None

    def apply(self, model: PreTrainedModel) -> set[str]:
        """Put peft's layers around the target modules; their factors (and the biases asked for) train."""
        from adapters import experts, starts
        from adapters.anatomy import own_name, owner
        from adapters.injection import inject

        experts.ordered(model, self.stacks)
        names = inject(model, self._config(), [*self.modules, *map(owner, self.stacks)])
        experts.refuse_misplaced(model, self.stacks)
        own = self._unfrozen(model, {**self.modules, **self.stacks})
        names |= {name for name, _ in model.named_parameters() if own_name(name) in own}
        if self._paired:
            for path in self.modules:
                down, up = _factors(model, path)
                down.register_hook(starts.held(0, down.shape[0] // 2))
                up.register_hook(starts.held(1, up.shape[1] // 2))
        return names

    def begin(self, model: PreTrainedModel) -> None:
        """PiSSA and OLoRA: the weight's own factors, once as they train and once, negated, as they stay."""
        if not self._paired:
            return
        import torch

        from adapters import starts
        from adapters.injection import by_pattern

        with torch.no_grad():
            for path in self.modules:
                rank, scale = int(by_pattern(self.rank_pattern, path, self.r)), self._scale(path)
                down, up = starts.principal(starts.weight(model, path), rank, scale, str(self.init_lora_weights))
                live_down, live_up = _factors(model, path)
                live_down.copy_(torch.cat([down, down]))
                live_up.copy_(torch.cat([up, -up], dim=1))

    def paces(self, model: PreTrainedModel, trained: Sequence[str]) -> Mapping[str, Pace]:
        """All at the run's learning rate."""
        return {}

    def _config(self) -> Any:
        deferred.import_peft()
        import peft

        options = {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if entry.name not in ("modules", "stacks", "modules_to_save", "exclude_modules", "unfrozen_parameters")
        }
        options["target_modules"] = list(self.target_modules or ())
        options["target_parameters"] = list(self.target_parameters) if self.target_parameters else None
        options["init_lora_weights"] = True if self._paired else self.init_lora_weights
        return peft.LoraConfig(**options | self._sizes(), fan_in_fan_out=self._transposed())

    def _sizes(self) -> dict[str, Any]:
        """Ranks and alphas as the layers have them: twice the rank with the start kept, at the same scale."""
        ranks, alphas = dict(self.rank_pattern), dict(self.alpha_pattern)
        if not self._paired:
            return {"r": self.r, "lora_alpha": self.lora_alpha, "rank_pattern": ranks, "alpha_pattern": alphas}
        twice = 2**0.5 if self.use_rslora else 2
        return {
            "r": 2 * self.r,
            "lora_alpha": twice * self.lora_alpha,
            "rank_pattern": {pattern: 2 * rank for pattern, rank in ranks.items()},
            "alpha_pattern": {pattern: twice * alpha for pattern, alpha in alphas.items()},
        }

    def _transposed(self) -> bool:
        """peft's flag for GPT-2's Conv1D; embeddings are transposed by nature and do not count."""
        return any(transposed and has_bias for _, _, transposed, has_bias in self.modules.values())

    def key(self, name: str) -> str:
        """peft's key; DoRA's magnitudes keep the form that they had before they became a module."""
        from adapters.injection import key

        own = key(name)
        return own.removesuffix(".weight") if "lora_magnitude_vector" in own else own

    def edits(self, state: Mapping[str, Tensor]) -> dict[str, Edit]:
        """A low-rank addition for each adapted weight; whatever else trained replaces the old tensor.

        DoRA and biases on the update go through peft's own merge.
        """
        from adapters import experts
        from adapters.edits import AddLowRank, replace_all
        from adapters.injection import grouped, merge_edits

        if self.use_dora:
            full_names = {f"{n}.weight" if n.endswith("lora_magnitude_vector") else n: t for n, t in state.items()}
            return merge_edits(self._config(), self.modules, full_names)
        edits: dict[str, Edit] = {}
        for name, entry in self.stacks.items():
            keys = self._stack_keys(name)
            edits[name] = experts.edit(entry, state[keys[0]], state[keys[1]], self._scale(name))
            state = {key: tensor for key, tensor in state.items() if key not in keys}
        by_module, whole = grouped(state, self.modules)
        for path, tensors in by_module.items():
            down = tensors.get("lora_A.weight", tensors.get("lora_embedding_A"))
            up = tensors.get("lora_B.weight", tensors.get("lora_embedding_B"))
            if down is None or up is None or len(tensors) != 2:
                from adapters.errors import FolderError, message

                raise FolderError(
                    message("a LoRA module needs exactly its two factors", where=path, found=", ".join(sorted(tensors)))
                )
            edits[f"{path}.weight"] = AddLowRank(down, up, self._scale(path), bool(self.modules[path][2]))
        return edits | replace_all(whole)

    @classmethod
    def of_factors(cls, factors: Mapping[str, Factors], unfrozen: Collection[str] = (), stacks: Stacks = NONE) -> Lora:
        """The adapter that holds computed factors as they are (its scale is 1), and whole tensors beside them.

        Args:
            factors: by module path.
            unfrozen: the backbone's own names of the whole tensors, the head's left out.
            stacks: factors of experts, by name.

        Returns:
            Not resolved: the model tells the rest.
        """
        ranks = {path: found.rank for path, found in factors.items()}
        ranks |= {name: found.rank for name, found in stacks.items()}
        most = Counter(ranks.values()).most_common(1)[0][0]
        others = {path: rank for path, rank in ranks.items() if rank != most}
        return cls(
            r=most,
            lora_alpha=most,
            target_modules=tuple(factors),
            target_parameters=tuple(stacks) or None,
            rank_pattern={re.escape(path): rank for path, rank in others.items()},
            alpha_pattern={re.escape(path): float(rank) for path, rank in others.items()},
            unfrozen_parameters=tuple(f"^{re.escape(name)}$" for name in sorted(unfrozen)),
        )

    def tensors(self, factors: Mapping[str, Factors], stacks: Stacks = NONE) -> dict[str, Tensor]:
        """Computed factors by their keys in the adapter file; B is divided by the scale that each module has here."""
        from adapters import experts
        from adapters.injection import PREFIX

        found: dict[str, Tensor] = {}
        for name, stack in stacks.items():
            flat = experts.flat(stack.down, stack.up / self._scale(name))
            found |= dict(zip(self._stack_keys(name), flat, strict=True))
        for path, pair in factors.items():
            _, _, transposed, has_bias = self.modules[path]
            first, second = (
                ("lora_embedding_A", "lora_embedding_B")
                if transposed and not has_bias
                else ("lora_A.weight", "lora_B.weight")
            )
            found[f"{PREFIX}{path}.{first}"] = pair.down
            found[f"{PREFIX}{path}.{second}"] = pair.up / self._scale(path)
        return found

    def _stack_keys(self, name: str) -> tuple[str, str]:
        """The keys of a stack's two factors in the adapter file."""
        from adapters.injection import PREFIX

        place = f"{PREFIX}{self.stacks[name][4]}"
        return f"{place}.lora_A.weight", f"{place}.lora_B.weight"

    def _scale(self, path: str) -> float:
        from adapters.injection import by_pattern

        sizes = self._sizes()
        rank = by_pattern(sizes["rank_pattern"], path, sizes["r"])
        alpha = by_pattern(sizes["alpha_pattern"], path, sizes["lora_alpha"])
        return float(alpha / rank**0.5 if self.use_rslora else alpha / rank)

    def strip(self, model: PreTrainedModel) -> None:
        """Take peft's layers out again."""
        from adapters import experts
        from adapters.injection import strip

        strip(model)
        experts.restored(model, self.stacks)

    def sidecars(self) -> dict[str, dict[str, Any]]:
        """A minimal adapter_config.json, so that peft, vLLM and TGI read the folder."""
        options: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": None,
            "inference_mode": True,
            "lora_dropout": self.lora_dropout,
            "target_modules": list(self.target_modules or ()),
            "bias": self.bias,
            "fan_in_fan_out": self._transposed(),
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "modules_to_save": list(self.modules_to_save) or None,
        }
        if self.target_parameters:
            options |= {"target_parameters": list(self.target_parameters), "peft_version": version("peft")}
        if self.layers_to_transform is not None:
            options["layers_to_transform"] = self.layers_to_transform
        options |= {name: value for name, value in self._sizes().items() if value != {}}
        return {"adapter_config.json": options}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _factors(model: PreTrainedModel, path: str) -> tuple[Any, Any]:
    """The live factors of one module: lora_A's weight (rank, in) and lora_B's (out, rank)."""
    from adapters.injection import ADAPTER

    layer: Any = model.get_submodule(path)
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
