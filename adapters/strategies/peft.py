"""Any method of peft, by its own config object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from adapters.contracts import RESOLVED, check_types

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.edits import Edit


@final
@dataclass(frozen=True)
class Peft:
    """A peft method (IA3, LoHa, LoKr, OFT, ...) put in place, with the same files, checks and merge as LoRA.

    Attributes:
        config: the options of the peft config that differ from its defaults, with "peft_type".
        modules_to_save: filled on resolving: the head and new modules, trained whole.
        modules: filled on resolving: path -> [in, out, transposed, has bias] of each adapted module.
    """

    name: ClassVar[str] = "peft"
    defaults: ClassVar[Mapping[str, object]] = {"learning_rate": 1e-3, "num_train_epochs": 6}

    config: Mapping[str, Any] = field(default_factory=dict)
    modules_to_save: Sequence[str] = field(default=(), metadata=RESOLVED)
    modules: Mapping[str, Sequence[Any]] = field(default_factory=dict, metadata=RESOLVED)

    def __post_init__(self) -> None:
        check_types(self)

    def resolve(self, model: PreTrainedModel, head: frozenset[str]) -> Self:
        """Find the target modules and check that each pattern matches.

        Raises:
            RequestError: a pattern that matches nothing, or a method that peft cannot put in place.
        """
        from adapters.anatomy import shortest_suffixes
        from adapters.injection import candidates, choose, layout, whole_modules

        self._object()  # an unknown method or option speaks first
        asked = {"patterns": self.config.get("target_modules"), "exclude": self.config.get("exclude_modules")}
        every_layer = choose(model, head, **asked)
        chosen = choose(model, head, **asked, layers=self.config.get("layers_to_transform"))
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
        return replace(
            self,
            config=config,
            modules_to_save=tuple(whole_modules(model, head)),
            modules=layout(chosen),
        )

    def _object(self) -> Any:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        from adapters.errors import RequestError, message, nearest

        options = dict(self.config)
        kind = options.pop("peft_type", "")
        known = {str(getattr(entry, "value", entry)): entry for entry in PEFT_TYPE_TO_CONFIG_MAPPING}
        if kind not in known:
            raise RequestError(
                message(
                    f"unknown peft_type {kind!r}", where="strategy 'peft': config", remedy=nearest(str(kind), known)
                )
            )
        config_class = PEFT_TYPE_TO_CONFIG_MAPPING[known[kind]]
        if "fan_in_fan_out" in config_class.__dataclass_fields__:
            options["fan_in_fan_out"] = any(t and bias for _, _, t, bias in self.modules.values())
        unknown = sorted(set(options) - set(config_class.__dataclass_fields__))
        if unknown:
            raise RequestError(
                message(
                    f"{config_class.__name__} has no option {unknown[0]!r}",
                    where=f"strategy 'peft': config of {kind}",
                    remedy=nearest(unknown[0], config_class.__dataclass_fields__),
                )
            )
        return config_class(**options)

    def apply(self, model: PreTrainedModel) -> set[str]:
        """Put peft's layers around the target modules; their parameters train."""
        from adapters.injection import inject

        return inject(model, self._object(), self.modules)

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
        """The adapter_config.json that peft reads."""
        options = {
            **self.config,
            "task_type": None,
            "inference_mode": True,
            "modules_to_save": list(self.modules_to_save) or None,
        }
        return {"adapter_config.json": options}
