"""Ground truth: models retrained on subsets of the training rows, and what they lose on the queries."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

import gradfn
from gradfn.errors import InputError
from gradfn.evaluate.retraining import Retraining, Seeding
from gradfn.evaluate.subsets import FEWEST, check_subsets
from gradfn.methods.scoring import names_of
from gradfn.model.losses import ModelLoss
from gradfn.runs.output import Output, WriteOptions
from gradfn.runs.provenance import DataSource, Provenance, loss_source
from gradfn.runs.shards import Shard, shard_rows
from gradfn.store import Store, open_part, open_store, storable
from gradfn.train import (
    Losses,
    Table,
    Trained,
    Trainer,
    alone_if_needed,
    initial_params,
    losses_at,
    make_trainer,
    stacked_losses,
    table_of,
)
from gradfn.train.step import Removal
from gradfn.types import Data, LossFn, Params
from gradfn.watch import Resumed

KIND = "truth"
CLASSES = ("classification", "image_classification")
"""Tasks whose predictions are right or wrong."""


@dataclass(frozen=True, eq=False)
class Truth:
    """Retrained models and their losses on the queries; see `retrain`.

    Args:
        subsets: the rows that each model was trained on, bool `[models, rows]`.
        numbers: which subset a model's is; models of one subset differ in their seed, int `[models]`.
        seeds: of initialisation and data order, int `[models]`.
        losses: the loss of each query, NaN where the training diverged, `[models, queries]`.
        train_losses: the mean loss of the last epoch, `[models]`.
        diverged: whether a loss or a parameter is not finite, `[models]`.
        row_ids, query_ids: the names of training rows and of queries.
        settings: what all of this depends on.
        looped: why the models were trained one by one, or empty where they stacked.
        margins: where there are classes, how far each query's right one is above the best of the others,
            `[models, queries]`; a prediction is right where that is above 0.
        weights: what the losses of rows were multiplied by, `[models, rows]`, or the parts of their tokens,
            `[models, rows, tokens]`; None: 1 in a subset, else 0.

    >>> truth = Truth(torch.tensor([[True, False], [True, False], [False, True]]), torch.tensor([0, 0, 1]),
    ...     torch.tensor([0, 1, 2]), torch.tensor([[1.0], [3.0], [5.0]]).double(), torch.zeros(3).double(),
    ...     torch.zeros(3, dtype=torch.bool), ["a", "b"], ["q"], {})
    >>> truth.targets()
    (tensor([[ True, False],
            [False,  True]]), tensor([[2.],
            [5.]], dtype=torch.float64))
    """

    subsets: Bool[Tensor, "models rows"]
    numbers: Int64[Tensor, " models"]
    seeds: Int64[Tensor, " models"]
    losses: Float64[Tensor, "models queries"]
    train_losses: Float64[Tensor, " models"]
    diverged: Bool[Tensor, " models"]
    row_ids: list[str]
    query_ids: list[str]
    settings: dict[str, Any]
    looped: str = ""
    margins: Float64[Tensor, "models queries"] | None = None
    weights: Float64[Tensor, "models rows *tokens"] | None = None

    def targets(self) -> tuple[Bool[Tensor, "subsets rows"], Float64[Tensor, "subsets queries"]]:
        """The subsets, and the mean loss of each query over a subset's seeds, of the models `averaged`."""
        return self.subsets[self._firsts()], self._means(self.losses)

    def weighed(self) -> Float64[Tensor, "subsets rows *tokens"]:
        """The weights of the rows, or tokens, in the same subsets."""
        return self.row_weights[self._firsts()]

    @property
    def row_weights(self) -> Float64[Tensor, "models rows *tokens"]:
        """The weights of the rows, or of their tokens, in every model."""
        return self.subsets.double() if self.weights is None else self.weights

    def _firsts(self) -> list[int]:
        """The first model of each subset that is averaged."""
        known = self.numbers[self.averaged()].unique()
        return [int((self.numbers == number).nonzero()[0]) for number in known]

    @property
    def removal(self) -> Removal:
        """What became of rows outside a subset."""
        return "mask" if self.settings.get("removal") == "mask" else "drop"

    @property
    def seeding(self) -> Seeding:
        """Whether subsets share seeds."""
        return "independent" if len(self.seeds.unique()) == len(self.seeds) > 1 else "shared"

    @property
    def replicates(self) -> int:
        """The models of a subset; where some diverged, of the subset that has most."""
        return int(self.numbers.unique(return_counts=True)[1].max())

    def averaged(self) -> Bool[Tensor, " models"]:
        """Which models to average: as many as leave each subset the same seeds.

        A shared seed changes the losses of all subsets alike, so a mean that lacks one differs by that. Left
        out are the subsets that lost a model; or those that lost all, and the seeds that any other lost,
        where this keeps more models, or the first fewer than three subsets. Where every model has a seed of
        its own, only the models that diverged are left out.

        >>> truth = Truth(torch.eye(4).bool().repeat_interleave(2, 0), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]),
        ...     torch.tensor([0, 1] * 4), torch.zeros(8, 1).double(), torch.zeros(8).double(),
        ...     torch.arange(8) == 1, ["a", "b", "c", "d"], ["q"], {})
        >>> truth.averaged().int()
        tensor([0, 0, 1, 1, 1, 1, 1, 1], dtype=torch.int32)
        """
        if self.seeding == "independent":
            return ~self.diverged
        alive = torch.isin(self.numbers, self.numbers[~self.diverged])
        whole = ~torch.isin(self.numbers, self.numbers[self.diverged])
        common = alive & ~torch.isin(self.seeds, self.seeds[alive & self.diverged])

        def worth(models: Tensor) -> tuple[bool, int]:
            return len(self.numbers[models].unique()) >= FEWEST, int(models.sum())

        return max(whole, common, key=worth)

    def of_models(self, models: Bool[Tensor, " models"]) -> "Truth":
        """The same of some models only."""
        return replace(
            self, subsets=self.subsets[models], numbers=self.numbers[models], seeds=self.seeds[models],
            losses=self.losses[models], train_losses=self.train_losses[models],
            diverged=self.diverged[models],
            margins=None if self.margins is None else self.margins[models],
            weights=None if self.weights is None else self.weights[models],
        )  # fmt: skip

    def by_fraction(self) -> "list[Truth]":
        """The same of each size of random subsets, where several were asked for; else all of it.

        >>> truth = Truth(torch.tensor([[True, True, False], [True, False, False]]), torch.tensor([0, 1]),
        ...     torch.tensor([0, 0]), torch.zeros(2, 1).double(), torch.zeros(2).double(),
        ...     torch.zeros(2, dtype=torch.bool), ["a", "b", "c"], ["q"],
        ...     {"subsets": {"fraction": [0.67, 0.33]}})
        >>> [len(part.seeds) for part in truth.by_fraction()]
        [1, 1]
        """
        if not isinstance(self.settings.get("subsets", {}).get("fraction"), list):
            return [self]
        sizes = self.subsets.sum(1)
        return [self.of_models(sizes == size) for size in sizes.unique().flip(0)]

    def leaving_one_out(self) -> "Truth":
        """The same of the models that were trained without one row each.

        Raises:
            InputError: there are fewer than three such subsets.
        """
        alone = self.subsets.sum(1) == self.subsets.shape[1] - 1
        if len(self.numbers[alone].unique()) < FEWEST:
            raise InputError(
                f"{int(alone.sum())} of the {len(alone)} retrained models leave out one row each, and a "
                f"correlation needs {FEWEST} or more such subsets: make them with gradfn "
                "retrain --leave-out 1"
            )
        return self.of_models(alone)

    def whole_seeds(self) -> "Truth":
        """The same of the seeds of which no model diverged: removals are compared, so all must be there.

        Raises:
            InputError: of every seed, or of all models of a subset, one diverged.
        """
        whole = ~torch.isin(self.seeds, self.seeds[self.diverged])
        if len(self.numbers[whole].unique()) < len(self.numbers.unique()):
            which = "of every seed a model" if self.seeding == "shared" else "every model of a subset"
            raise InputError(f"{which} diverged, so a removal is missing: retrain with a lower learning rate")
        return self.of_models(whole)

    @property
    def of_answers(self) -> bool:
        """Whether a query's loss is minus the log-probability of its whole answer, which is no class."""
        if self.margins is not None:
            return False
        loss, subsets = self.settings.get("query_loss", {}), self.settings.get("subsets", {})
        whole = loss.get("reduction") == "sum" or subsets.get("answer_tokens") == 1
        return loss.get("criterion") == "cross_entropy" and not loss.get("label_smoothing") and whole

    def mean_margins(self) -> Float64[Tensor, "subsets queries"] | None:
        """The same means of the margins, where there are classes."""
        return None if self.margins is None else self._means(self.margins)

    def _means(self, values: Tensor) -> Tensor:
        averaged = self.averaged()
        known, of, counts = self.numbers[averaged].unique(return_inverse=True, return_counts=True)
        sums = values.new_zeros(len(known), values.shape[1]).index_add_(0, of, values[averaged])
        return sums / counts[:, None]


def retrain(
    run: str | Path,
    retraining: Retraining,
    train: Data,
    query: Data,
    **options: Unpack[WriteOptions],
) -> Truth:
    """Retrain models on subsets of the rows and write what they lose on the queries to `RUN/truth.h5`.

    A row of the store is a model, those of a subset side by side. A run that was killed resumes behind the
    last models that are complete. Models that diverge are counted, and in no mean, see `Truth.averaged`.

    Args:
        run: the directory to write.
        retraining: the models.
        train, query: the rows, and the queries.
        options: `settings` to record besides, such as how the subsets were made; `overwrite`; `shard`, the
            part of the models to do; `progress`, called with the examples done; see
            `gradfn.runs.output.Output`.

    Returns:
        The ground truth; of a shard, its models.

    Raises:
        InputError: subsets that do not fit the rows, or leave a class (whole-number `labels`) out; no
            queries; a chunk below 1; a run that was made otherwise; see `make_trainer`.
    """
    output, models, training = Output(run, **options), retraining.models(), retraining.training
    trainer = make_trainer(retraining.start, retraining.loss, train, training)
    placed, weights = models.placed(retraining.removal)
    trainer.check(placed, models.seeds.tolist(), weights)
    check_subsets(retraining.subsets, _classes(trainer.table))
    size = trainer.at_once(retraining.chunk)
    asked = _query_losses(retraining)
    queries = _queries(trainer, asked, query)
    made = _describe(retraining, asked, trainer, train, query).merged(output.settings)
    rows, progress = len(models.seeds), output.progress
    own = shard_of_models(rows, output.shard)
    slices = [(at, min(at + size, own.stop)) for at in range(own.start, own.stop, size)]
    part = None if output.shard is None else (own.start, own.stop)
    names = {"rows/id": storable(names_of(train)), "queries/id": storable(names_of(query))}
    with output.open(KIND, made, rows, part=part, names=names) as writer:
        missing = writer.missing(slices)
        if progress is not None:
            done = {*own} - {model for span in missing for model in range(*span)}
            progress(Resumed(training.epochs * placed[sorted(done)].sum()))
        for begin, end in missing:
            known = models.part(begin, end)
            trained = trainer.train(
                placed[begin:end], known["seeds"].tolist(), chunk=size, progress=progress,
                weights=None if weights is None else weights[begin:end],
            )  # fmt: skip
            results = {**known, **_losses(trained, queries, training.batch_size)}
            writer.write(begin, end, {name: value.cpu().numpy() for name, value in results.items()})
        writer.finish({**names, "looped": [trainer.looped or ""]})
    with open_part(output.folder, KIND) as store:
        return _read(store)


def shard_of_models(models: int, shard: Shard | None) -> range:
    """The numbers of the models that a shard trains; None: all.

    Raises:
        InputError: more shards than models.

    >>> shard_of_models(6, Shard(2, 2))
    range(3, 6)
    """
    return range(models) if shard is None else shard_rows(np.ones(models, np.int64), shard)


def _classes(table: Table) -> Tensor | None:
    """The class of every row, where a row's label is one whole number."""
    labels = table.columns.get("labels")
    return labels if labels is not None and labels.ndim == 1 and not labels.is_floating_point() else None


def _query_losses(retraining: Retraining) -> dict[str, LossFn]:
    """What is asked of queries: their loss and, where there are classes, minus their margin."""
    loss = retraining.query_loss or retraining.loss
    margin = retraining.margin_loss
    if margin is None and isinstance(loss, ModelLoss) and loss.task in CLASSES:
        margin = replace(loss, criterion="margin", label_smoothing=0.0)
    return {"losses": loss} | ({} if margin is None else {"margins": margin})


_Queries = Mapping[str, tuple[Losses, Table]]
"""What is asked of many models at the queries, by what it is called."""


def _queries(trainer: Trainer, losses: Mapping[str, LossFn], query: Data) -> _Queries:
    """The losses of many models on queries, and the queries; of margins without their weights."""
    params, made = initial_params(trainer.start, 0), {}
    whole = table_of(query, next(iter(params.values())).device)
    plain = replace(whole, columns={key: v for key, v in whole.columns.items() if key != "weight"})
    for name, loss in losses.items():
        table = plain if name == "margins" else whole
        two = table.take(torch.tensor([0, len(table) - 1]))
        many = stacked_losses(loss, params, two)[0]
        made[name] = many, alone_if_needed(table, query, many, params)
    return made


def _losses(trained: Trained, queries: _Queries, batch_size: int) -> dict[str, Tensor]:
    """The losses and margins of trained models, NaN where they diverged."""
    made = {name: query_losses(trained.params, *asked, batch_size) for name, asked in queries.items()}
    diverged = trained.diverged | ~torch.stack([values.isfinite().all(1) for values in made.values()]).all(0)
    finite = {name: torch.where(diverged[:, None], torch.nan, values) for name, values in made.items()}
    if "margins" in finite:
        finite["margins"] = -finite["margins"]
    return {**finite, "train_losses": trained.losses, "diverged": diverged}


def query_losses(
    params: Params, losses: Losses, table: Table, batch_size: int
) -> Float64[Tensor, "models queries"]:
    """The loss of each query under each of stacked models, so many queries at a time."""
    models = len(next(iter(params.values())))
    with torch.no_grad():
        return torch.cat([
            losses_at(losses, params, table, rows.expand(models, -1)).double()
            for rows in torch.arange(len(table)).split(batch_size)
        ], 1)  # fmt: skip


def _describe(
    retraining: Retraining, asked: Mapping[str, LossFn], trainer: Trainer, train: Data, query: Data
) -> Provenance:
    """What the truth depends on."""
    given = isinstance(retraining.start, dict)
    masks = np.packbits(retraining.subsets.numpy()).tobytes()
    if retraining.weights is not None:
        masks += retraining.weights.cpu().numpy().tobytes()
    return Provenance(
        version=gradfn.__version__,
        data=DataSource(fingerprint=_fingerprint(train, trainer.table), rows=len(train)),
        query=DataSource(fingerprint=_fingerprint(query, None), rows=len(query)),
        loss=loss_source(retraining.loss),
        query_loss=loss_source(asked["losses"]),
        margin_loss=loss_source(asked["margins"]) if "margins" in asked else None,
        init={"kind": "given" if given else "random", "digest": _digest(initial_params(trainer.start, 0))},
        training=retraining.training.settings(),
        subsets={"count": len(retraining.subsets), "digest": hashlib.sha256(masks).hexdigest()[:16]},
        seeds=retraining.seeds,
        seed=retraining.seed,
        seeding=retraining.seeding,
        removal="mask" if retraining.removal == "mask" else None,  # earlier runs did not record it
    )


def _fingerprint(data: Data, table: Table | None) -> str:
    """That of the data itself where it has one."""
    own = getattr(data, "fingerprint", None)
    return str(own()) if callable(own) else _digest((table or table_of(data)).columns)


def _digest(tensors: Params) -> str:
    """16 hex digits of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def open_truth(run: str | Path) -> Truth:
    """Read what `retrain` wrote.

    Raises:
        InputError: the run is absent, unfinished or damaged.
    """
    with open_store(run, KIND) as store:
        if store.header.kind != KIND:
            raise InputError(
                f"{store.path} holds {store.header.kind}, not losses of retrained models: give a run that "
                "retrain wrote"
            )
        return _read(store)


def _read(store: Store) -> Truth:
    arrays = {name: torch.from_numpy(store.read(name, *store.span)) for name in store.names()}
    row_ids, query_ids, looped = (
        [str(name) for name in store.index_array(key)] for key in ("rows/id", "queries/id", "looped")
    )
    return Truth(**arrays, row_ids=row_ids, query_ids=query_ids, settings=store.settings, looped=looped[0])
