"""Provenance: what a run was made of. It is described, compared with that of other runs, and rebuilt from."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from torch import nn

import gradfn
from gradfn.data import check_rows
from gradfn.errors import InputError
from gradfn.model.fingerprint import model_fingerprint
from gradfn.model.losses import CausalLMLoss, ModelLoss
from gradfn.model.sites import View
from gradfn.runs.changes import changed_model
from gradfn.store import Store, differing, in_words
from gradfn.subject import Subject
from gradfn.transforms import Transform, chain, unit_normalize
from gradfn.transforms.projection import Loaders, lenient, parse_projection
from gradfn.types import Data, LossFn

AnyRecord = TypeVar("AnyRecord", bound="Record")
Settings = Mapping[str, Any]
"""Plain JSON values, as a store holds them."""
RECORDED = "recorded"
"""What the settings have of rows of a training run, each at the parameters before its step."""
TAIL = ("Precondition", "UnitNormalize")
"""The stages that may end a chain, in this order, and that can be added to stored rows later."""
SCALES = ("Adam", "Adafactor", "OptimizerScale")
"""The stages that are an optimizer's scaling: of one state, and of a training's at each of its steps."""
PATHS = {"Principal": 2, "Selected": 1}
"""Projections that were read from a run, and how many words of their spelling come before its path."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """Named values that go to JSON and come back; None is a value that was not recorded.

    Args:
        further: values that were recorded under other names than those of the fields.
    """

    further: Settings = field(default_factory=dict)

    @classmethod
    def from_json(cls: type[AnyRecord], values: Settings) -> AnyRecord:
        """Read what `to_json` gave, or any store holds."""
        names = {field.metadata.get("key", field.name): field.name for field in fields(cls)}
        known = {names[key]: _typed(key, value) for key, value in values.items() if key in names}
        return cls(**known, further={key: value for key, value in values.items() if key not in names})

    def to_json(self) -> dict[str, Any]:
        """Plain values by name, without what was not recorded."""
        values = {field.metadata.get("key", field.name): getattr(self, field.name) for field in fields(self)}
        further = values.pop("further")
        return {**{key: _plain(v) for key, v in values.items() if v is not None}, **further}


@dataclass(frozen=True, kw_only=True)
class Source(Record):
    """A file or folder that was read: where it was, and what tells its content from another.

    >>> Source(path="tokenizer").to_json()
    {'path': 'tokenizer'}
    """

    path: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSource(Source):
    """A model: its revision on the hub, the dtype of its weights, how float32 matrices were multiplied, its
    kernel of attention."""

    revision: str | None = None
    precision: str | None = None
    products: str | None = None
    attention: str | None = None

    def __str__(self) -> str:
        made = ", ".join(part for part in (self.path, self.precision) if part is not None)
        return f"{made} (fingerprint {self.fingerprint})" if made else str(self.fingerprint)


@dataclass(frozen=True, kw_only=True)
class LossSource(Record):
    """A loss, and the model that a divergence is taken from."""

    name: str | None = None
    reduction: str | None = None
    criterion: str | None = None
    label_smoothing: float | None = None
    reference: ModelSource | None = None


@dataclass(frozen=True, kw_only=True)
class DataSource(Source):
    """Examples, with a digest of their ids. Of queries also their loss, how they were grouped, and how
    stored gradients were made."""

    revision: str | None = None
    split: str | None = None
    rows: int | None = None
    ids: str | None = None
    loss: LossSource | None = None
    groups: str | None = None
    groups_fingerprint: str | None = None
    transform: Settings | None = None
    aggregation: str | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Record):
    """One of the models that joined scores are of, and its weight."""

    path: str | None = None
    weight: float | None = None
    settings: "Provenance | None" = None


@dataclass(frozen=True, kw_only=True)
class Provenance(Record):
    """All that the rows of a run depend on, and the request that asked for them.

    Args:
        version: of gradfn.
        model, tokenizer, processor, data, optimizer_state: what was read.
        masking: which tokens a masked language model had to guess.
        loss: of training rows.
        layers: which weights, see `View.settings`.
        transform: the chain that gradients went through, see `Chain.settings`.
        aggregation: of a store with one row, "mean" or "sum".
        by_block: whether scores were told apart by block.
        recipe, method: of scores.
        query: of scores; "self" where rows were scored against themselves.
        hessian: how a curvature was fitted, or where the one was that was read.
        basis: of the second of two passes to a curvature, a digest of what the first gave.
        checkpoints: of joined scores.
        mask: how the coordinates of a mask were chosen.
        query_loss, margin_loss, init, training, subsets, seeds, seed, seeding, removal: of retrained models,
            see `retrain`.
        request: what was asked for, such as a command with the options that were given. Two runs that
            differ only in this are the same.

    >>> made = Provenance.of({"gradfn": "0.1.0", "data": {"path": "rows.jsonl"}, "note": 1})
    >>> made.version, made.data.path, made.further
    ('0.1.0', 'rows.jsonl', {'note': 1})
    """

    version: str | None = field(default=None, metadata={"key": "gradfn"})
    model: ModelSource | None = None
    tokenizer: Source | None = None
    processor: Source | None = None
    masking: Settings | None = None
    data: DataSource | None = None
    loss: LossSource | None = None
    layers: Settings | None = None
    transform: Settings | None = None
    aggregation: str | None = None
    by_block: bool | None = None
    recipe: str | None = None
    method: Settings | None = None
    query: DataSource | str | None = None
    hessian: Settings | None = None
    basis: str | None = None
    optimizer_state: Source | None = None
    checkpoints: tuple[Checkpoint, ...] | None = None
    mask: Settings | None = None
    query_loss: LossSource | None = None
    margin_loss: LossSource | None = None
    init: Settings | None = None
    training: Settings | None = None
    subsets: Settings | None = None
    seeds: int | None = None
    seed: int | None = None
    seeding: str | None = None
    removal: str | None = None
    request: Settings | None = None

    @classmethod
    def of(cls, made: "Provenance | Store | Settings | None") -> "Provenance":
        """That of a store, or of settings as a store holds them."""
        if isinstance(made, Provenance):
            return made
        if isinstance(made, Store):
            return cls.from_json({**made.settings, **({"request": made.request} if made.request else {})})
        return cls.from_json(made or {})

    def settings(self) -> dict[str, Any]:
        """What a store compares: all but the request."""
        return replace(self, request=None).to_json()

    def merged(self, more: "Provenance | Settings | None") -> "Provenance":
        """With what `more` says beside this, or instead.

        >>> made = Provenance(model=ModelSource(fingerprint="ab"))
        >>> made.merged({"model": {"path": "gpt2"}}).model.to_json()
        {'path': 'gpt2', 'fingerprint': 'ab'}
        """
        return Provenance.from_json(_merged(self.to_json(), Provenance.of(more).to_json()))

    def by_row(self) -> "Provenance":
        """The same of gradients of rows, where these are of tokens."""
        return replace(self, layers={**(self.layers or {}), "tokens": False})

    @property
    def stages(self) -> list[Settings]:
        """The settings of the transform's stages, in order."""
        return list((self.transform or {}).get("chain", ()))

    @property
    def tail(self) -> list[Settings]:
        """The curvature and the unit norm that end the chain, as far as there are any."""
        stages, tail = self.stages, []
        for name in reversed(TAIL):
            if stages and stages[-1]["transform"] == name:
                tail.insert(0, stages.pop())
        return tail

    def without_tail(self) -> "Provenance":
        """The same before the curvature and the unit norm, which can be added to stored rows later."""
        return replace(self, transform={"chain": self.stages[: len(self.stages) - len(self.tail)]})


RECORDS: dict[str, type[Record]] = {
    "model": ModelSource, "reference": ModelSource, "tokenizer": Source, "processor": Source,
    "optimizer_state": Source, "data": DataSource, "query": DataSource, "loss": LossSource,
    "query_loss": LossSource, "margin_loss": LossSource,
    "checkpoints": Checkpoint, "settings": Provenance,
}  # fmt: skip
"""What the fields of these names hold."""


def _typed(key: str, value: Any) -> Any:
    if key not in RECORDS:
        return value
    if isinstance(value, list):
        return tuple(RECORDS[key].from_json(one) for one in value)
    return RECORDS[key].from_json(value) if isinstance(value, Mapping) else value


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return value.to_json() if isinstance(value, Record) else value


def _merged(settings: Settings, more: Settings) -> dict[str, Any]:
    groups = {key for key, value in more.items() if isinstance(value, Mapping)}
    both = {key for key in groups if isinstance(settings.get(key), Mapping)}
    return {**settings, **more, **{key: _merged(settings[key], more[key]) for key in both}}


# --- describe


def describe(subject: Subject, data: Data, transform: Transform | None) -> Provenance:
    """What the rows of a run depend on: model, data, loss, layers and transform."""
    made = describe_model(subject.model, data, subject.view, transform)
    return replace(made, loss=loss_source(subject.loss))


def describe_model(
    model: nn.Module, data: Data | None, view: View, transform: Transform | None
) -> Provenance:
    """The same without a loss, and where the data is not known without data."""
    if data is not None:
        check_rows(data)
    fingerprint: Callable[[], str] | None = getattr(data, "fingerprint", None)
    source = None if data is None else DataSource(rows=len(data), ids=ids_digest(data))
    if source is not None and fingerprint is not None:
        source = replace(source, fingerprint=fingerprint())
    return Provenance(
        version=gradfn.__version__,
        model=ModelSource(fingerprint=model_fingerprint(model)),
        data=source,
        layers=view.settings(),
        transform=chain(transform or chain()).settings(),
    )


def ids_digest(data: Data) -> str | None:
    """16 hex digits of the names of rows; None where they have none.

    >>> ids_digest([])
    """
    ids = getattr(data, "ids", None)
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:16] if ids else None


def loss_source(loss: LossFn) -> LossSource:
    """What a run records of a loss.

    >>> def square(params, example): ...
    >>> loss_source(square).to_json()
    {'name': 'square'}
    """
    if not isinstance(loss, CausalLMLoss | ModelLoss):
        name = getattr(loss, "__qualname__", type(loss).__name__)
        return LossSource(name=name, reduction=getattr(loss, "reduction", None))
    reference: nn.Module | None = getattr(loss, "reference", None)
    return LossSource(
        name=loss.task if isinstance(loss, ModelLoss) else "causal_lm",
        reduction=loss.reduction,
        criterion=loss.criterion,
        label_smoothing=loss.label_smoothing,
        reference=None if reference is None else ModelSource(fingerprint=model_fingerprint(reference)),
    )


# --- compare


def compare(there: Provenance, here: Provenance) -> dict[str, tuple[Any, Any]]:
    """The leaves in which two provenances differ, of those that must agree for gradients to be compared.

    These are the model, the layers and the transform, but for its tail; and, where both record one, the
    tokenizer, the image processor and what tokens are masked by. The rows of a training run are at the
    parameters of many steps, and behind the optimizer's scaling of many, so any model and scaling go with
    them.

    Returns:
        `{dotted key: (value there, value here)}`, see `differing`.

    >>> one, other = (Provenance(model=ModelSource(fingerprint=text)) for text in "ab")
    >>> compare(one, other)
    {'model': ('a', 'b')}
    """
    models = there.model or ModelSource(), here.model or ModelSource()
    same = models[0].fingerprint == models[1].fingerprint
    sides = [
        {"model": model.fingerprint if same else str(model), "layers": made.layers,
         "transform": {"chain": [_without_path(stage) for stage in made.without_tail().stages]}}
        for made, model in zip((there, here), models, strict=True)
    ]  # fmt: skip
    if RECORDED in there.further or RECORDED in here.further:
        sides = [{**side, "model": None, "transform": _at_any_step(side["transform"])} for side in sides]
    for key in ("tokenizer", "processor"):
        prints = [source and source.fingerprint for source in (getattr(there, key), getattr(here, key))]
        if None not in prints:
            for side, fingerprint in zip(sides, prints, strict=True):
                side[key] = fingerprint
    if there.masking is not None and here.masking is not None:
        sides[0]["masking"], sides[1]["masking"] = there.masking, here.masking
    return differing(*sides)


def _named(*models: ModelSource | None) -> tuple[str, ...] | None:
    """Two models by their paths and precisions, where both have them."""
    known = [model for model in models if model is not None and model.path is not None]
    return tuple(f"{one.path}, {one.precision}" for one in known) if len(known) == len(models) else None


def _without_path(stage: Settings) -> Settings:
    """A stage without the path of the run that it was read from, since its digest tells which it is."""
    words = str(stage.get("projection")).split(":")
    count = PATHS.get(stage["transform"])
    return stage if count is None else {**stage, "projection": ":".join(words[:count])}


def _at_any_step(transform: Settings) -> Settings:
    """A transform in which an optimizer's scaling is that of whatever step."""
    return {"chain": [{"transform": "OptimizerScale"} if stage["transform"] in SCALES else stage
                      for stage in transform["chain"]]}  # fmt: skip


def refuse_mismatch(
    stored: Provenance | Store | Settings, wanted: Provenance | Store | Settings, what: str
) -> None:
    """Refuse to compare gradients that were made differently; see `compare`.

    A curvature and a final unit norm may be added to what is stored; a unit norm cannot be taken away.

    Args:
        stored: how the gradients on disk were made.
        wanted: how those were made that they are to be compared with.
        what: the name of what is stored, for the message.

    Raises:
        InputError: naming what differs, with both values.
    """
    there, here = Provenance.of(stored), Provenance.of(wanted)
    if differences := compare(there, here):
        more = ""
        if "model" in differences and (models := _named(there.model, here.model)):
            differences["model"] = models[0], models[1]
            paths, precisions = zip(*(one.rsplit(", ", 1) for one in models), strict=True)
            changed = changed_model(*paths) if len({*precisions}) == 1 else ""
            more = f"; {changed}" if changed else ""
        raise InputError(
            f"{what} was made differently, so its gradients cannot be compared "
            f"({in_words(differences, str)}{more}): use the same model and options, or make it again"
        )
    unit = [bool(made.stages) and made.stages[-1]["transform"] == "UnitNormalize" for made in (there, here)]
    if unit == [True, False]:
        raise InputError(
            f"{what} was made with unit norm, which cannot be undone: end the transform in "
            "`unit_normalize()` (cosine), or make it again without"
        )


# --- rebuild


def rebuild(
    made: Provenance | Store | Settings, normalize: Transform | None = None, loaders: Loaders | None = None
) -> Transform:
    """Make the transform again that gradients went through.

    Args:
        made: how they were made.
        normalize: the optimizer's normalisation, of which a store has only a digest.
        loaders: of projections that are read from runs, see `parse_projection`.

    Raises:
        InputError: the chain has a stage that holds tensors, of which a store has only a digest; a
            normalisation is given, and the chain has none.

    >>> rebuild({"transform": chain(unit_normalize()).settings()}).stages[0]
    UnitNormalize()
    """
    stages, there = [], Provenance.of(made).stages
    if normalize is not None and not any(stage["transform"] in SCALES for stage in there):
        raise InputError("the rows were not divided by an optimizer's second moment: leave out `normalize`")
    for stage in there:
        match stage["transform"]:
            case "Project" | "Compress" | "Joint":
                stages.extend(lenient(parse_projection(stage["projection"], stage.get("seed", 0))).stages)
            case "Principal" | "Selected" if loaders is not None:
                (again,) = parse_projection(stage["projection"], 0, loaders).stages
                if again.settings() != stage:
                    raise InputError(f"{stage['projection']} is another one by now: make the store again")
                stages.append(again)
            case "UnitNormalize":
                stages.append(unit_normalize())
            case "Adam" | "Adafactor" | "OptimizerScale" if normalize is not None:
                stages.append(normalize)
            case "OptimizerScale":
                raise InputError(
                    "rows were divided by the second moment that the optimizer had at each step, which a "
                    "store does not keep: give `normalize=gf.hf.load_optimizer_state(...)` of a checkpoint, "
                    "to divide the queries by"
                )
            case name:
                raise InputError(f"{name} cannot be made from a store's settings: give its transform again")
    return chain(*stages)
