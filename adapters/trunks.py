"""A backbone under a task's model class, opened once for many adapters: its tensors are shared and never written.

An adapter is put in beside them: as a `mixing.Change` of each module that it changes. Model classes of one backbone
(a classifier, a tagger) are opened one after the other and hold the same tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from adapters import mixing, onload, reading, rowforms
from adapters.adapt import assemble
from adapters.anatomy import copied, linear_map, owner, plain_name
from adapters.backbones import live_model
from adapters.changes import Changes
from adapters.edits import AddLowRank, Edit, MergeLayer, Replace
from adapters.errors import FolderError, RequestError, message
from adapters.fingerprint import Fingerprint
from adapters.inserts import Change, Pair
from adapters.manifest import refuse_other_backbone
from adapters.mixing import Choice, Mixed
from adapters.modes import evaluating
from adapters.prefix import Cut, cut_of
from adapters.quantize import dequantized, is_packed
from adapters.storage import acceptance, saved_processor, strategy_of, task_of
from adapters.vocabulary import of_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adapters.contracts import Adapted, Vocabulary


def key_of(document: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    """What tells trunks apart: the model class, where its head reads, how weights are stored, which tokens it knows."""
    backbone, task = document["backbone"], task_of(document, where)
    vocabulary = document["vocabulary"]
    return (
        task.auto_class,
        reading.of(task),
        backbone["quantization"],
        tuple(sorted(backbone["packed"] or ())),
        tuple(vocabulary["tokens"]) if vocabulary else (),
    )


@final
class Trunk:
    """One model class of a backbone.

    Args:
        adapted: the first adapter's adaptation of it, whose strategy is taken off again.
        pool: tensors of the same backbone that are in memory already, by their plain names on disk; filled up.

    Attributes:
        net: the model as the backbone has it, with a head of no account.
        mixed: the same tensors in a graph of its own, whose changed modules take each row's own adapter.
        choice: which that is.
    """

    def __init__(self, adapted: Adapted, pool: dict[str, nn.Parameter]) -> None:
        self.net: PreTrainedModel = adapted.model
        adapted.strategy.strip(self.net)
        self.fingerprint: Fingerprint = adapted.fingerprint
        self.head = adapted.brought - adapted.record.unread
        self.storage, self.names = adapted.storage, adapted.names
        self.vocabulary: Vocabulary | None = adapted.vocabulary
        self.net.requires_grad_(False)
        self.net.train(False)
        if self.vocabulary is None:
            _share(self.net, {name: disk for name, disk in self.names.items() if name not in adapted.brought}, pool)
        self.owners = _owners(self.net)
        self.choice = Choice()
        self.mixed: PreTrainedModel = copied(self.net, lambda tensor: tensor)
        self.mixed.requires_grad_(False)
        self.generates = bool(self.net.can_generate())
        self._by_rows: dict[str, bool] = {}
        self._cuts: dict[frozenset[str], Cut | None] = {}

    # ------------------------------------------------------------------ an adapter's changes

    def accept(self, changes: Changes, *, verified: bool) -> None:
        """Compare the backbone with the one that an adapter was trained on.

        Raises:
            BackboneError: another one.
            FolderError: it lacks the head, or changes what is not there.
        """
        where = str(changes.folder)
        if verified:
            refuse_other_backbone(changes.document, self.fingerprint, where)
        recorded = of_manifest(changes.document, where)
        if recorded != self.vocabulary:
            found = recorded.ids[:3] if recorded else ()
            raise FolderError(message("the added tokens have other numbers than here", where=where, found=found))
        lacking = sorted(self.head - set(changes.edits))
        unknown = sorted(set(changes.edits) - set(self.owners))
        if lacking or unknown:
            raise FolderError(
                message(
                    "the adapter's tensors are not those of this model",
                    where=f"{where}: {(lacking or unknown)[0]}",
                    expected=f"{len(self.head)} tensors of the head, and others of {type(self.net).__name__}",
                    found=f"{len(lacking)} of the head missing, {len(unknown)} of no module",
                )
            )

    def changed(self, edits: Mapping[str, Edit], where: str) -> dict[str, Change]:
        """What edits of tensors change of modules, by the modules' paths.

        Raises:
            FolderError: a tensor of another shape.
        """
        forms: dict[str, Change] = {}
        whole: dict[str, dict[str, Tensor]] = {}
        with torch.no_grad():
            for name, edit in edits.items():
                (path, leaf), *others = self.owners[name]
                form = self._form(path, edit) if leaf == "weight" and not others else None
                if form is not None:
                    forms[path] = form
            for name, edit in edits.items():
                places = self.owners[name]
                path, leaf = places[0]
                if path in forms and (leaf == "weight" or isinstance(edit, MergeLayer)):
                    continue  # a layer's form has its bias in it
                new = self._whole(name, edit, where)
                for path, leaf in places:
                    whole.setdefault(path, {})[leaf] = new
            return {path: self._change(path, forms.get(path), whole.get(path, {})) for path in {**forms, **whole}}

    def _form(self, path: str, edit: Edit) -> Change | None:
        """An edit of a linear map's weight as what happens to rows; None for other edits, and for other modules."""
        module = self.net.get_submodule(path)
        described = linear_map(path, module)
        if described is None:
            return None
        own, device = module.get_parameter("weight"), self.net.device
        if isinstance(edit, AddLowRank) and (edit.down.shape[1], edit.up.shape[0]) == tuple(described.shape):
            dtype = torch.promote_types(edit.down.dtype, own.dtype)
            down, up = edit.down.to(device, dtype), (edit.up.to(dtype) * edit.scale).T.to(device)
            return Change(Pair(down.contiguous(), up.contiguous()))
        if not isinstance(edit, MergeLayer) or edit.part != "weight":
            return None
        plain = own.detach().T if described.transposed else own.detach()
        weight = dequantized(module) if is_packed(module) else plain
        bias = module._parameters.get("bias")
        form = rowforms.form_of(edit, weight.cpu(), None if bias is None else bias.detach().cpu())
        return None if form is None else form.to(device)

    def _change(self, path: str, form: Change | None, whole: Mapping[str, Tensor]) -> Change:
        """What an adapter does to a module: a form by rows, whole tensors, or both."""
        if form is None or form.gain is None or "bias" not in whole:
            return dataclasses.replace(form, whole=whole) if form is not None else Change(whole=whole)
        own = self.net.get_submodule(path).get_parameter("bias")  # scaled with the outputs: the trained one is not
        return dataclasses.replace(form, shift=whole["bias"] - form.gain * own)

    def _whole(self, name: str, edit: Edit, where: str) -> Tensor:
        path, leaf = self.owners[name][0]
        module = self.net.get_submodule(path)
        own = module.get_parameter(leaf)
        if leaf == "weight" and is_packed(module):  # as (out, in), whatever the backbone's layout
            turned = bool(getattr(linear_map(path, module), "transposed", False))
            old = dequantized(module)
            new = edit(old.T if turned else old)
            return (new.T if turned else new).contiguous()
        if isinstance(edit, Replace):
            if name not in self.head and edit.new.shape != own.shape:
                raise FolderError(
                    message(
                        "a tensor of another shape",
                        where=f"{where}: {name}",
                        expected=tuple(own.shape),
                        found=tuple(edit.new.shape),
                    )
                )
            return edit(None).to(device=own.device, dtype=own.dtype)
        return edit(own.detach().cpu()).to(device=own.device, dtype=own.dtype)

    def shape(self, changes: Mapping[str, Change]) -> tuple[Any, ...]:
        """The shapes of an adapter's head: adapters of one shape give their logits together."""
        places = [self.owners[name][0] for name in sorted(self.head)]
        return tuple(tuple(changes[path].whole[leaf].shape) for path, leaf in places)

    # ------------------------------------------------------------------ passes

    def alone(self, name: str, changes: Mapping[str, Change]) -> PreTrainedModel:
        """A graph of its own around the shared tensors, with one adapter in it."""
        net: PreTrainedModel = copied(self.net, lambda tensor: tensor)
        net.requires_grad_(False)
        choice = Choice()
        choice.names = (name,)
        for path, change in changes.items():
            module = net.get_submodule(path)
            packed = is_packed(module) and "weight" in change.whole
            for leaf, tensor in {} if packed else change.whole.items():
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            if change.by_rows or packed:
                slot = Mixed(path, module, choice)
                slot.changes[name] = change if packed else dataclasses.replace(change, whole={})
                vars(module)["forward"] = slot
        return net

    def by_rows(self, paths: Iterable[str], inputs: Mapping[str, Any]) -> bool:
        """Whether all of these modules compute each row by itself; what is not known yet is tried with one row."""
        asked = [path for path in paths if path not in self._by_rows]
        if asked:
            with evaluating(self.mixed), torch.no_grad(), self.choice.made(()):
                found = mixing.confirm(self.mixed, asked, self.whole_inputs(inputs))
            self._by_rows |= {path: path in found for path in asked}
        return all(self._by_rows[path] for path in paths)

    def whole_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs of one plain pass: a generating encoder-decoder's decoder begins with two tokens."""
        given = {name: value for name, value in inputs.items() if name not in ("labels", "row")}
        if self.net.config.is_encoder_decoder and self.generates and "decoder_input_ids" not in given:
            start = self.net.config.decoder_start_token_id or 0
            given["decoder_input_ids"] = torch.full((len(given["input_ids"]), 2), start, device=self.net.device)
        return given

    def cut(self, changed: Sequence[frozenset[str]]) -> Cut | None:
        """The highest place below which none of these adapters changes anything; None where there is none.

        Args:
            changed: of each adapter, the names of the tensors that it changes.
        """
        cuts = []
        for names in dict.fromkeys(changed):
            if names not in self._cuts:
                self._cuts[names] = self._placed(cut_of(self.net, sorted(names | self.head)))
            cuts.append(self._cuts[names])
        found = [cut for cut in cuts if cut is not None]
        if len(found) < len(cuts) or not found:
            return None
        return min(found, key=lambda cut: len(cut.passed))

    def _placed(self, cut: Cut | None) -> Cut | None:
        """The same modules of the graph that is mixed; None where one of them is told another forward pass already."""
        if cut is None:
            return None
        paths = {id(module): path for path, module in self.net.named_modules()}
        holder, *passed = (self.mixed.get_submodule(paths[id(each)]) for each in (cut.holder, *cut.passed))
        if any("forward" in vars(module) for module in (holder, *passed)):
            return None
        return Cut(cut.path, holder, tuple(passed))


def opened(
    base: Any, changes: Changes, load: Mapping[str, Any], pool: dict[str, nn.Parameter], *, verify: str
) -> tuple[Trunk, Any]:
    """The trunk that an adapter needs, its backbone compared with the recorded one; and the adapter's processor.

    Args:
        base: id, folder, or a live model, which stays as it is.
        changes: the adapter.
        load: what `from_pretrained` takes.
        pool: see `Trunk`.
        verify: "strict", "fast" or "off", as `adapters.load` has it.

    Raises:
        BackboneError: another backbone.
        RequestError: a backbone that cannot be opened for the adapter's task, or lies on several devices.
    """
    document, where = changes.document, str(changes.folder)
    strategy, task, vocabulary = strategy_of(document, where), task_of(document, where), of_manifest(document, where)
    backbone = document["backbone"]
    live = live_model(base)
    adapted = assemble(
        copied(base, lambda tensor: tensor) if live else base,
        strategy,
        task,
        None if live and any(map(is_packed, base.modules())) else backbone["quantization"],
        dict(load),
        saved_processor(changes.folder, document, task),
        int(document["seed"]),
        accept=acceptance(document, where, {}, strategy, vocabulary, verified=verify != "off"),
        full=verify == "strict",
        added_tokens=vocabulary.tokens if vocabulary is not None else (),
        claimed=Fingerprint.from_json(backbone["fingerprint"]) if verify == "off" else None,
    )
    away = onload.placed(adapted.model)
    if away is not None and away.device.type != "cpu":
        raise RequestError(
            message(
                "a shared backbone lies on one device",
                where=f"{base if not live else type(base).__name__}, load: device_map",
                expected="every weight there, beside what each adapter changes",
                found=f"{len(away.names)} parameters elsewhere than on {away.device}",
                remedy="Leave device_map out, or answer with one adapter at a time (adapters.load, predict).",
            )
        )
    return Trunk(adapted, pool), adapted.processor


def _owners(net: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """Every module and name under which a parameter is held, by each of its names; tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    places = {each: [(owner(name), name.rpartition(".")[2]) for name in held] for each, held in names.items()}
    return {name: places[each] for each, held in names.items() for name in held}


def _share(net: PreTrainedModel, names: Mapping[str, str], pool: dict[str, nn.Parameter]) -> None:
    """Hold the pool's tensor wherever it has the same values; what it lacks goes into it."""
    held: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in net.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                held.setdefault(id(parameter), []).append((module, leaf))
    parameters = dict(net.named_parameters())
    for name, disk in names.items():
        mine = parameters.get(name)
        if mine is None or getattr(mine, "quant_state", None) is not None:
            continue
        theirs = pool.setdefault(plain_name(disk, net.base_model_prefix), mine)
        alike = (theirs.dtype, theirs.shape, theirs.device) == (mine.dtype, mine.shape, mine.device)
        if theirs is not mine and alike and torch.equal(theirs, mine):
            for module, leaf in held[id(mine)]:
                module._parameters[leaf] = theirs
