"""Any method of peft, by its own config: IA3, OFT, BOFT, LoHa, LoKr, HRA by name, the others by their config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from adapters import deferred
from adapters.options import RESOLVED, check_types

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.edits import Edit
    from adapters.pace import Pace


@final
@dataclass(frozen=True)
class Method:
    """What is known of a method before peft is imported.

    Attributes:
        options: its options by peft's names, beside those that every method has.
        defaults: the training settings that work without a knob.
    """

    options: tuple[str, ...]
    defaults: Mapping[str, object]

    @property
    def names(self) -> set[str]:
        """All options that a caller may give."""
        return {"target_modules", "exclude_modules", *self.options}


_LAYERS = ("layers_to_transform",)
_LYCORIS = ("r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout", "init_weights", *_LAYERS)
PLAIN: Mapping[str, object] = {"learning_rate": 1e-3, "num_train_epochs": 6}
METHODS: Mapping[str, Method] = {
    "IA3": Method(("feedforward_modules", "init_ia3_weights"), PLAIN),
    "OFT": Method(
        (
            *("r", "oft_block_size", "module_dropout", "bias", "init_weights", "coft", "eps", "block_share"),
            *("use_cayley_neumann", "num_cayley_neumann_terms", *_LAYERS),
        ),
        PLAIN,
    ),
    "BOFT": Method(
        (
            *("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "bias", "init_weights"),
            *_LAYERS,
        ),
        PLAIN,
    ),
    "LOHA": Method(_LYCORIS, PLAIN),
    "LOKR": Method((*_LYCORIS, "decompose_both", "decompose_factor", "rank_dropout_scale"), PLAIN),
    "HRA": Method(("r", "apply_GS", "bias", "init_weights", *_LAYERS), PLAIN),
}
# What cannot be had although peft puts it in place.
REFUSED = {"ADALORA": "its ranks are pruned by peft's own wrapper after each step"}


@final
@dataclass(frozen=True)
class Peft:
    """A peft method put in place, with the same files, checks and merge as LoRA.

    Attributes:
        config: the options of the peft config that differ from its defaults, with "peft_type".
        modules_to_save: filled on resolving: the head and new modules, trained whole.
        modules: filled on resolving: path -> [in, out, transposed, has bias] of each adapted module.
    """

    name: ClassVar[str] = "peft"

    config: Mapping[str, Any] = field(default_factory=dict)
    modules_to_save: Sequence[str] = field(default=(), metadata=RESOLVED)
    modules: Mapping[str, Sequence[Any]] = field(default_factory=dict, metadata=RESOLVED)

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def defaults(self) -> Mapping[str, object]:
        """The method's training settings."""
        known = METHODS.get(str(self.config.get("peft_type")))
        return known.defaults if known else PLAIN

    def resolve(self, model: PreTrainedModel, head: frozenset[str]) -> Self:
        """Find the target modules, check that each pattern matches, and try the method on small layers of their kinds.

        Raises:
            RequestError: a pattern that matches nothing, a method that peft cannot put in place, layers that it cannot
                adapt or merge.
        """
        from adapters.anatomy import shortest_suffixes
        from adapters.injection import candidates, check_patterns, choose, layout, whole_modules
        from adapters.rehearsal import rehearse

        self._object()  # an unknown method or option speaks first
        asked = {"patterns": self.config.get("target_modules"), "exclude": self.config.get("exclude_modules")}
        every_layer = choose(model, head, **asked)
        chosen = choose(model, head, **asked, layers=self.config.get("layers_to_transform"))
        for option in ("rank_pattern", "alpha_pattern"):
            check_patterns(option, self.config.get(option) or {}, chosen)
        others = [path for path, _ in model.named_modules() if path not in every_layer]
        others += [path for path in candidates(model, head) if path not in every_layer]
        config = {**self.config, "target_modules": shortest_suffixes(every_layer, others)}
        config.pop("exclude_modules", None)
        config.pop("modules_to_save", None)
        feed_forward = config.get("feedforward_modules")
        if config["peft_type"] == "IA3" and feed_forward is None:
            # IA3 scales the inputs of the feed-forward's last map and the outputs of the others. Where nothing is
            # said, all outputs are scaled, which every linear map allows.
            config["feedforward_modules"] = []
        resolved = replace(
            self,
            config=config,
            modules_to_save=tuple(whole_modules(model, head)),
            modules=layout(chosen),
        )
        rehearse(resolved._object(), resolved.modules, packed=bool(vars(model).get("is_loaded_in_4bit")))
        return resolved

    def _object(self) -> Any:
        deferred.import_peft()
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        from adapters.errors import RequestError, message, nearest

        options = dict(self.config)
        kind = options.pop("peft_type", "")
        where = "strategy 'peft': config"
        known = {str(getattr(entry, "value", entry)): entry for entry in PEFT_TYPE_TO_CONFIG_MAPPING}
        if kind not in known:
            raise RequestError(message(f"unknown peft_type {kind!r}", where=where, remedy=nearest(str(kind), known)))
        config_class = PEFT_TYPE_TO_CONFIG_MAPPING[known[kind]]
        entries = config_class.__dataclass_fields__
        reason = REFUSED.get(kind, "" if "target_modules" in entries else "it lives in peft's wrapper, not in layers")
        if reason:
            raise RequestError(
                message(
                    f"the method {kind} cannot be put in place: {reason}",
                    where=where,
                    remedy=f"Take 'lora', or a method that adapts layers: {', '.join(METHODS)} ...",
                )
            )
        if options.get("target_parameters"):
            raise RequestError(
                message(
                    "factors of experts belong to the strategy 'lora'",
                    where=f"{where} of {kind}: target_parameters",
                    found=repr(options["target_parameters"])[:80],
                    remedy="Take the strategy 'lora' with target_parameters, and of peft's options those that it has.",
                )
            )
        if kind == "LORA" and options.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal"):
            raise RequestError(
                message(
                    "a start that needs the backbone's weights or rows",
                    where=f"{where} of {kind}: init_lora_weights",
                    found=repr(options["init_lora_weights"]),
                    remedy="Take the strategy 'lora': it says which starts it knows, and keeps the backbone as it is.",
                )
            )
        if "fan_in_fan_out" in entries:
            options["fan_in_fan_out"] = any(t and bias for _, _, t, bias in self.modules.values())
        unknown = sorted(set(options) - set(entries))
        if unknown:
            raise RequestError(
                message(
                    f"{config_class.__name__} has no option {unknown[0]!r}",
                    where=f"{where} of {kind}",
                    remedy=nearest(unknown[0], entries),
                )
            )
        try:
            return config_class(**options)
        except (ValueError, TypeError) as fault:
            raise RequestError(
                message("peft refuses the options", where=f"{where} of {kind}", found=" ".join(str(fault).split()))
            ) from fault

    def apply(self, model: PreTrainedModel) -> set[str]:
        """Put peft's layers around the target modules; their parameters train."""
        from adapters.injection import inject

        return inject(model, self._object(), self.modules)

    def begin(self, model: PreTrainedModel) -> None:
        """Training starts where peft's layers start."""

    def paces(self, model: PreTrainedModel, trained: Sequence[str]) -> Mapping[str, Pace]:
        """All at the run's learning rate."""
        return {}

    def key(self, name: str) -> str:
        """peft's key."""
        from adapters.injection import key

        return key(name)

    def edits(self, state: Mapping[str, Tensor]) -> dict[str, Edit]:
        """peft's own merge of each layer; whatever else trained replaces the old tensor."""
        from adapters.injection import merge_edits

        return merge_edits(self._object(), self.modules, state)

    def strip(self, model: PreTrainedModel) -> None:
        """Take peft's layers out again."""
        from adapters.injection import strip

        strip(model)

    def sidecars(self) -> dict[str, dict[str, Any]]:
        """The adapter_config.json that peft reads; OFT's reader asks for the version that wrote it, and for the size of
        its blocks, whose default is another one than it once was."""
        oft = self.config["peft_type"] == "OFT"
        options = {
            **({"oft_block_size": self._object().oft_block_size} if oft else {}),
            **self.config,
            "task_type": None,
            "inference_mode": True,
            "modules_to_save": list(self.modules_to_save) or None,
            "peft_version": version("peft"),
        }
        return {"adapter_config.json": options}
