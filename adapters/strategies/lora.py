"""LoRA: frozen weights plus a trained low-rank product (Hu et al., 2021), by peft's layers put in place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from adapters.contracts import RESOLVED, check_types

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.edits import Edit


def learning_rate(model: PreTrainedModel) -> float:
    """A learning rate by the model's width: 2e-3 up to 384, 1.2e-3 at 768, 3e-4 at 4096.

    The exponent is the one that Schulman et al. (LoRA Without Regret, 2025) fitted over Llama and Qwen sizes; the
    factor was measured here on MiniLM (docs/benchmarks.md).
    """
    width = max(384, model.config.get_text_config().hidden_size)
    return float(2e-3 * (384 / width) ** 0.775)


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
        exclude_modules: what is left out of these, in the same forms.
        layers_to_transform: numbers of the blocks that are adapted, None for all.
        bias: "none", or "lora_only": the adapted modules' biases train too, or "all".
        use_rslora: rank-stabilised scale (Kalajdzievski, 2023).
        use_dora: weight-decomposed update (Liu et al., 2024).
        rank_pattern, alpha_pattern: other r or lora_alpha for modules whose path ends in a key (a regular expression).
        init_lora_weights: True for the standard start (B = 0), False for random factors, or "gaussian".
        modules_to_save: filled on resolving: the head and new modules, trained whole.
        modules: filled on resolving: path -> [in, out, transposed, has bias] of each adapted module.
    """

    name: ClassVar[str] = "lora"
    defaults: ClassVar[Mapping[str, object]] = {"learning_rate": learning_rate, "num_train_epochs": 6}

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    layers_to_transform: Sequence[int] | int | None = None
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    init_lora_weights: bool | str = True
    modules_to_save: Sequence[str] = field(default=(), metadata=RESOLVED)
    modules: Mapping[str, Sequence[Any]] = field(default_factory=dict, metadata=RESOLVED)

    def __post_init__(self) -> None:
        check_types(self)

    def resolve(self, model: PreTrainedModel, head: frozenset[str]) -> Self:
        """Find the target modules in the model's graph and check every option against them.

        Raises:
            RequestError: a value out of range, or a pattern that matches nothing.
        """
        from adapters.anatomy import shortest_suffixes
        from adapters.injection import candidates, choose, layout, whole_modules

        self._check()
        every_layer = choose(model, head, patterns=self.target_modules, exclude=self.exclude_modules)
        chosen = choose(
            model,
            head,
            patterns=self.target_modules,
            exclude=self.exclude_modules,
            layers=self.layers_to_transform,
        )
        # Named against every other module of the model, so that the saved suffixes cannot catch a head or a pooler.
        others = [path for path, _ in model.named_modules() if path not in every_layer]
        others += [path for path in candidates(model, head) if path not in every_layer]
        self._check_patterns(chosen)
        layers = self.layers_to_transform
        return replace(
            self,
            target_modules=tuple(shortest_suffixes(every_layer, others)),
            exclude_modules=None,
            layers_to_transform=[layers] if isinstance(layers, int) else None if layers is None else list(layers),
            modules_to_save=tuple(whole_modules(model, head)),
            modules=layout(chosen),
        )

    def _check(self) -> None:
        from adapters.errors import RequestError, message

        faults = [
            (
                isinstance(self.r, int) and not isinstance(self.r, bool) and self.r > 0,
                "r",
                "a whole number > 0",
                self.r,
            ),
            (_is_number(self.lora_alpha) and self.lora_alpha > 0, "lora_alpha", "a number > 0", self.lora_alpha),
            (
                _is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1,
                "lora_dropout",
                "a share from 0 to below 1",
                self.lora_dropout,
            ),
            (self.bias in ("none", "all", "lora_only"), "bias", '"none", "all" or "lora_only"', self.bias),
            (
                isinstance(self.init_lora_weights, bool) or self.init_lora_weights == "gaussian",
                "init_lora_weights",
                'True, False or "gaussian" (pissa, olora and the like overwrite the backbone when they start)',
                self.init_lora_weights,
            ),
        ]
        wrong = [message("a wrong value", where=w, expected=e, found=repr(f)) for fine, w, e, f in faults if not fine]
        if wrong:
            raise RequestError("; ".join(wrong))

    def _check_patterns(self, chosen: Mapping[str, object]) -> None:
        from adapters.errors import RequestError, message

        for option, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as fault:
                    raise RequestError(
                        message(f"{pattern!r} is no regular expression", where=option, found=fault)
                    ) from fault
                if not any(_pattern_matches(pattern, path) for path in chosen):
                    raise RequestError(
                        message(
                            f"the pattern {pattern!r} matches none of the adapted modules",
                            where=option,
                            expected=f"the end of a path such as {next(iter(chosen))!r}",
                        )
                    )

    def apply(self, model: PreTrainedModel) -> set[str]:
        """Put peft's layers around the target modules; their factors (and the biases asked for) train."""
        from adapters.injection import inject

        return inject(model, self._config(), self.modules)

    def _config(self) -> Any:
        import peft

        options = {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if entry.name not in ("modules", "modules_to_save", "exclude_modules")
        }
        options["target_modules"] = list(self.target_modules or ())
        options["rank_pattern"], options["alpha_pattern"] = dict(self.rank_pattern), dict(self.alpha_pattern)
        return peft.LoraConfig(**options, fan_in_fan_out=self._transposed())

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
        from adapters.edits import AddLowRank, replace_all
        from adapters.injection import grouped, merge_edits

        if self.use_dora:
            full_names = {f"{n}.weight" if n.endswith("lora_magnitude_vector") else n: t for n, t in state.items()}
            return merge_edits(self._config(), self.modules, full_names)
        by_module, whole = grouped(state, self.modules)
        edits: dict[str, Edit] = {}
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

    def _scale(self, path: str) -> float:
        rank = _by_pattern(self.rank_pattern, path, self.r)
        alpha = _by_pattern(self.alpha_pattern, path, self.lora_alpha)
        return float(alpha / rank**0.5 if self.use_rslora else alpha / rank)

    def strip(self, model: PreTrainedModel) -> None:
        """Take peft's layers out again."""
        from adapters.injection import strip

        strip(model)

    def sidecars(self) -> dict[str, dict[str, Any]]:
        """A minimal adapter_config.json, so that peft, vLLM and TGI read the folder."""
        options: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": None,
            "inference_mode": True,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": list(self.target_modules or ()),
            "bias": self.bias,
            "fan_in_fan_out": self._transposed(),
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "modules_to_save": list(self.modules_to_save) or None,
        }
        if self.layers_to_transform is not None:
            options["layers_to_transform"] = self.layers_to_transform
        if self.rank_pattern:
            options["rank_pattern"] = dict(self.rank_pattern)
        if self.alpha_pattern:
            options["alpha_pattern"] = dict(self.alpha_pattern)
        return {"adapter_config.json": options}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _pattern_matches(pattern: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", path) is not None  # peft's own rule


def _by_pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
    return next((value for pattern, value in patterns.items() if _pattern_matches(pattern, path)), default)
