"""`Shared`: many adapters on one live backbone, chosen by name or row by row, whatever their strategies."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters import changes, rowwise
from adapters.backbones import live_model
from adapters.contracts import Adapted, Record
from adapters.errors import BackboneError, RequestError, SpentError, message, nearest
from adapters.fidelity import synthetic
from adapters.modes import evaluating
from adapters.predict import BATCH
from adapters.residents import Resident, Residents
from adapters.storage import LEVELS, fill_record, refuse_other, strategy_of
from adapters.trunks import Trunk, key_of, opened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@final
class Shared:
    """One backbone in memory, and any number of adapters on it.

    The backbone's tensors are never written: each adapter's own stand beside them. Adapters of every strategy may be
    loaded, of several tasks, with heads of different sizes.

    Args:
        backbone: a folder, a hub id, or a live transformers model in eval mode, which stays as it is; or an `Adapted`,
            whose backbone is taken.
        memory: what the adapters' tensors may take in memory, such as "200 MB" or a number of GB; the others wait on
            disk. None for no bound.
        load: what `from_pretrained` takes (dtype, device_map, revision, token, attn_implementation ...).
        verify: "strict" compares every byte of the backbone with the recorded ones, "fast" samples of each tensor,
            "off" nothing.

    Raises:
        RequestError: no model, one in training mode, a size that is none.
        SpentError: an `Adapted` that was merged.
    """

    def __init__(
        self,
        backbone: str | Path | PreTrainedModel | Adapted,
        *,
        memory: str | float | None = None,
        load: Mapping[str, Any] | None = None,
        verify: str = "strict",
    ) -> None:
        if verify not in LEVELS:
            raise RequestError(message(f"unknown verify {verify!r}", where="verify", remedy=nearest(verify, LEVELS)))
        self._base = _base_of(backbone)
        self._load, self._verify = dict(load or {}), verify
        self._trunks: dict[tuple[Any, ...], Trunk] = {}
        self._pool: dict[str, Any] = {}
        self._residents = Residents(memory)

    # ------------------------------------------------------------------ which adapters

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are loaded, in alphabetical order."""
        return tuple(sorted(self._residents.known))

    @property
    def resident(self) -> tuple[str, ...]:
        """Those of them whose tensors are in memory, the one used longest ago first."""
        return self._residents.inside

    @property
    def nbytes(self) -> int:
        """Bytes that the adapters' tensors take in memory."""
        return self._residents.nbytes

    def load(self, folder: str | Path, name: str | None = None) -> str:
        """Take an adapter in: every digest of its folder and its backbone are checked first.

        Args:
            folder: what `adapters.save` wrote, or a hub id.
            name: what it is called here; None for the folder's own name.

        Returns:
            The name.

        Raises:
            FolderError: the folder is damaged, edited or foreign.
            BackboneError: the adapter was trained on another backbone, and the message names what differs; or it was
                merged into this one already.
            RequestError: a name that is taken; an adapter that is larger than `memory`.
        """
        name = Path(folder).name if name is None else name
        self._residents.refuse(name)
        found = changes.read(folder)
        if self._verify != "off":
            refuse_other(found.document, self._base, self._load, str(found.folder))
        key = key_of(found.document, str(found.folder))
        trunk, processor = self._trunks.get(key), None
        if trunk is None:
            trunk, processor = opened(self._base, found, self._load, self._pool, verify=self._verify)
        trunk.accept(found, verified=self._verify != "off")
        processor = self._residents.processor(found, trunk.net, processor)
        resident = Resident(name, found, trunk, processor)
        self._residents.add(resident)
        self._trunks[key] = trunk
        if resident.merged:
            logger.warning(
                "%s holds %d weights whole, %.1f MB in all: what it does to them has no smaller form by rows",
                name,
                len(resident.merged),
                resident.nbytes / 1e6,
            )
        return name

    def unload(self, name: str) -> None:
        """Let an adapter go; what `use` gave of it is of no use any more.

        Raises:
            RequestError: an unknown name.
        """
        self._residents.drop(name)

    def use(self, name: str) -> Adapted:
        """One adapter by name, for `predict`, `evaluate` and whatever else only reads: its model is a graph of its own
        around the shared tensors. Training, saving and merging it are refused.

        Raises:
            RequestError: an unknown name.
        """
        resident = self._residents[name]
        with self._residents.needed([name]):
            known = resident.view() if resident.view is not None else None
            if known is None:
                known = self._view(resident)
                resident.view = weakref.ref(known)
            return known

    def _view(self, resident: Resident) -> Adapted:
        trunk = resident.trunk
        net = trunk.alone(resident.name, resident.held or {})
        for field, value in resident.task.config().items():
            if field != "num_labels":
                setattr(net.config, field, value)

        def still(_module: Any, _args: Any, _kwargs: Any) -> None:
            if resident.gone:
                raise RequestError(
                    message("this adapter was unloaded", where=resident.name, remedy="Load it again, then use it.")
                )

        net.register_forward_pre_hook(still, with_kwargs=True)
        record = Record(backbone=resident.backbone, shared=resident.name)
        fill_record(record, resident.document, resident.folder)
        return Adapted(
            net,
            strategy_of(resident.document, str(resident.folder)),
            resident.task,
            resident.processor,
            trunk.storage,
            (),
            frozenset(),
            trunk.fingerprint,
            trunk.names,
            record,
            trunk.vocabulary,
        )

    # ------------------------------------------------------------------ rows through their own adapters

    @contextlib.contextmanager
    def mixed(self, names: Sequence[str]) -> Iterator[PreTrainedModel]:
        """A live model whose passes, while this is open, take one row for each name, through that adapter.

        `model(**inputs)` and `model.generate(**inputs)` go as ever; rows that a pass multiplies (beams) stay their
        adapter's.

        Raises:
            RequestError: unknown names; adapters that cannot share a pass: other model classes or head sizes, or
                tensors that a pass uses for all rows at once.
        """
        import torch

        residents = [self._residents[name] for name in names]
        kinds = {(id(each.trunk), each.shape) for each in residents}
        if len(kinds) != 1:
            raise RequestError(
                message(
                    "adapters of different models or heads cannot give logits together",
                    where=", ".join(dict.fromkeys(names)),
                    expected="one model class and one size of the head",
                    found=f"{len(kinds)}",
                    remedy="predict(shared, rows, adapter=[...]) takes them, too.",
                )
            )
        trunk = residents[0].trunk
        with self._residents.needed(names), evaluating(trunk.mixed), torch.inference_mode():
            if len(set(names)) > 1:
                self._refuse_apart(residents)
            with trunk.choice.made(names):
                yield trunk.mixed

    def _refuse_apart(self, residents: Sequence[Resident]) -> None:
        trunk = residents[0].trunk
        inputs: dict[str, Any] = {}
        if any(each.apart is None for each in residents):
            inputs = {name: value.to(trunk.net.device) for name, value in synthetic(trunk.net).items()}
        odd = {each.name: str(each.apart) for each in residents if each.stands_apart(inputs)}
        if odd:
            raise RequestError(
                message(
                    "adapters that cannot share a pass",
                    where=", ".join(odd),
                    found=next(iter(odd.values())),
                    remedy="predict(shared, rows, adapter=[...]) runs their rows apart.",
                )
            )

    def predict(self, rows: Any, adapter: Sequence[str] | str, batch_size: int = BATCH) -> list[Any]:
        """What `adapters.predict(shared, rows, adapter=...)` answers."""
        return rowwise.answers(self._residents, self.use, rows, adapter, batch_size)

    def __str__(self) -> str:
        base = self._base if not live_model(self._base) else type(self._base).__name__
        return f"{len(self.names)} adapters on {base}, {self.nbytes / 1e6:.2f} MB of them in memory"

    def __repr__(self) -> str:
        return f"<Shared {self}>"


def _base_of(backbone: Any) -> Any:
    """The backbone that is asked for: a name, or a live model that nobody trains.

    Raises:
        RequestError, SpentError: see `Shared`.
    """
    if isinstance(backbone, Adapted):
        return _under(backbone)
    if isinstance(backbone, str | Path):
        return backbone
    from transformers import PreTrainedModel

    if not isinstance(backbone, PreTrainedModel):
        raise RequestError(
            message(
                "not a model",
                where="Shared",
                expected="a model id, a folder, a transformers model or an Adapted",
                found=type(backbone).__name__,
            )
        )
    if backbone.training:
        raise RequestError(
            message(
                "the model is in training mode, so its tensors may change under the adapters",
                where=f"Shared({type(backbone).__name__})",
                remedy="Say model.eval() when it is trained, or give its folder.",
            )
        )
    from adapters.anatomy import is_tuner_layer

    if any(is_tuner_layer(module) for module in backbone.modules()):
        raise RequestError(
            message(
                "the model carries an adapter already",
                where=f"Shared({type(backbone).__name__})",
                remedy="Give the Adapted that it belongs to, or the backbone's folder.",
            )
        )
    return backbone


def _under(adapted: Adapted) -> Any:
    """A graph of an adapted model's backbone, the adapter left out."""
    from adapters import pooling
    from adapters.anatomy import copied, own_name

    if adapted.record.spent:
        raise SpentError(
            message(
                "this adapter was merged into its model",
                where="Shared",
                remedy="Give the merged model's folder, or load the adapter's backbone again.",
            )
        )
    net = copied(adapted.model, lambda tensor: tensor)
    adapted.strategy.strip(net)
    plain = {name for name, _ in net.named_parameters()}
    own = [name for name in map(own_name, adapted.trained) if name in plain - adapted.head]
    if adapted.vocabulary is not None or own or adapted.record.shared:
        raise BackboneError(
            message(
                "the backbone's own tensors were trained, so the bare backbone is not in memory",
                where=f"Shared(Adapted), strategy {adapted.strategy.name!r}",
                found=own[0] if own else "added tokens" if adapted.vocabulary is not None else "a shared adapter",
                remedy="Give the backbone's folder.",
            )
        )
    pooling.strip(net)
    net.train(False)
    return net
