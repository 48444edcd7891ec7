"""What other packages give, as gradfn takes it: rows that are tuples, losses of outputs, checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, TypedDict, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradfn.errors import InputError
from gradfn.methods import Attribution, InnerProduct, Joined, over_checkpoints, score
from gradfn.model.params import call
from gradfn.model.sites import View
from gradfn.subject import Subject, subject_of
from gradfn.types import Batch, Data, Example, Params

Load = Callable[[nn.Module, Any], float | None]
"""Loads a checkpoint into a model, and gives its weight, the learning rate say; None is 1."""
LABEL = "label"
READ = {"input_ids", "attention_mask", "token_type_ids", "labels"}
"""What models of text read of a row, and its labels."""
PART = 64
"""Rows at a time that are scored for each other, where only a row's score for itself is wanted."""


def package(module: str) -> Any:
    """A module of a package that gradfn does not depend on.

    Raises:
        InputError: the package is not installed.

    >>> package("no_such_package.part")
    Traceback (most recent call last):
    gradfn.errors.InputError: this needs no_such_package, which cannot be imported (No module named \
'no_such_package'): pip install no_such_package
    """
    name = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(
            f"this needs {name}, which cannot be imported ({error}): pip install {name}"
        ) from error


class Options(TypedDict, total=False):
    """What may be said of a model beside its loss; see `Subject`."""

    view: View | None
    token_batch_size: int


@dataclass(frozen=True)
class SupervisedLoss:
    """A loss of a model's outputs and a label, `function(model(input), label)`, of one row at a time.

    Args:
        model: takes a batch of inputs, of several if rows have several.
        function: of a batch of outputs and labels; of one row, its mean, its sum and its parts are the same.

    >>> loss = SupervisedLoss(nn.Linear(2, 1, bias=False), nn.functional.mse_loss)
    >>> loss({"weight": torch.ones(1, 2)}, {"input_0": torch.ones(2), "label": torch.zeros(1)})
    tensor(4.)
    """

    model: nn.Module
    function: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, params: Params, example: Example) -> Tensor:
        """The definition: the batch of one row, at other parameters."""
        batch = {name: value[None] for name, value in example.items()}
        return self._of_one(call(self.model, params, *_inputs(batch))[0], example[LABEL])

    def batched(self, batch: Batch) -> Float[Tensor, " batch"]:
        """The same of every row, with one forward pass of the model."""
        return torch.vmap(self._of_one)(self.model(*_inputs(batch)), batch[LABEL])

    def _of_one(self, output: Tensor, label: Tensor) -> Tensor:
        return self.function(output[None], label[None]).sum()


def _inputs(batch: Batch) -> list[Tensor]:
    return [value for name, value in batch.items() if name != LABEL]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a torch dataset, `(input, ..., label)`, as examples; mappings are examples already.

    Args:
        dataset: of tensors and numbers. Of mappings with `input_ids` only what models of text read is taken.

    >>> Rows([(torch.ones(2), 3)])[0]
    {'input_0': tensor([1., 1.]), 'label': tensor(3)}
    """

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        given = self.dataset[range(len(self))[row]]
        if isinstance(given, Mapping):
            read = READ & given.keys() if "input_ids" in given else given.keys()
            return {name: torch.as_tensor(value) for name, value in given.items() if name in read}
        if not isinstance(given, Sequence) or len(given) < 2:
            raise InputError(
                f"row {row} is a {type(given).__name__}: give rows that are tuples of inputs and a label"
            )
        *inputs, label = map(torch.as_tensor, given)
        return {**{f"input_{at}": value for at, value in enumerate(inputs)}, LABEL: label}


def rows_of(batches: Any) -> Rows:
    """The rows of a batch `(inputs, ..., labels)`, of a mapping of batches, or of all batches of a loader.

    Raises:
        InputError: parts of a batch that are not of the same rows.

    >>> len(rows_of((torch.ones(3, 2), torch.zeros(3))))
    3
    """
    found: list[Any] = []
    for batch in [batches] if isinstance(batches, tuple | list | Mapping) else batches:
        parts = batch.values() if isinstance(batch, Mapping) else batch
        if len(lengths := {len(part) for part in parts}) != 1:
            raise InputError(
                f"the parts of a batch are of {sorted(lengths)} rows: give as many inputs as labels"
            )
        if isinstance(batch, Mapping):
            found += [dict(zip(batch, row, strict=True)) for row in zip(*parts, strict=True)]
        else:
            found += zip(*parts, strict=True)
    return Rows(found)


@dataclass(frozen=True, eq=False)
class Attributed:
    """A method at one or several checkpoints of a model, and its training rows: scores of any queries.

    What a method by its name fits to the training rows is fitted once, when scores are first asked for.

    Args:
        subjects: the checkpoints.
        weights: of the checkpoints.
        train: the training rows.
        method: by its name, or one that is made; then it is the same at every checkpoint.

    Raises:
        InputError: a method that is fitted to the queries, or gives one score for all of them.
    """

    subjects: Sequence[Subject]
    weights: Sequence[float]
    train: Data
    method: Attribution | str

    def __post_init__(self) -> None:
        if self.method == "trackstar":
            raise InputError(
                "trackstar is fitted to the queries, which come later here: fit a curvature yourself, and "
                "give method=gf.trackstar(curvature)"
            )
        if self.method == "less":
            raise InputError("less gives one score for all queries: give method=gf.grad_cosine(), say")

    def scores(self, query: Data) -> Float[Tensor, "queries rows"]:
        """The score of every training row for every query."""
        return self._scores(self.train, query).T.contiguous()

    def self_influence(self, rows: Data | None = None) -> Float[Tensor, " rows"]:
        """The score of every row for itself; None: of the training rows."""
        rows = self.train if rows is None else rows
        if all(isinstance(one, InnerProduct) and one.norm == "none" and not one.solve for one in self._parts):
            return self._scores(rows, None)[:, 0]
        parts = [[rows[row] for row in range(len(rows))[at : at + PART]] for at in range(0, len(rows), PART)]
        return torch.cat([self._scores(part, part).diagonal() for part in parts])

    def _scores(self, rows: Data, query: Data | None) -> Float[Tensor, "rows queries"]:
        return score(self.subjects[0], rows, query, method=self._made).matrix

    @cached_property
    def _made(self) -> Joined:
        if isinstance(self.method, str):
            return over_checkpoints(self.method, self.subjects, self.train, [], weights=self.weights)
        return Joined([(subject, self.method) for subject in self.subjects], self.weights)

    @property
    def _parts(self) -> list[Attribution]:
        return [made for _, made in self._made.parts]


def attributed(
    model: nn.Module,
    train: Any,
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None,
    method: Attribution | str,
    checkpoints: Sequence[Any] | None = None,
    load: Load | None = None,
    **options: Unpack[Options],
) -> Attributed:
    """A method on a model as other packages have it, at its weights or at checkpoints.

    Args:
        model: takes a batch of inputs; or a model of transformers, whose rows are mappings.
        train: a torch dataset of tuples `(input, ..., label)`, or of mappings.
        loss_fn: of outputs and labels; None: the model's own, of its task.
        method: see `gf.score`.
        checkpoints: each is loaded into a copy of the model; None: the model as it is, with weight 1.
        load: loads one, and gives its weight.
        options: `view`, `token_batch_size`; see `Subject`.

    Raises:
        InputError: checkpoints without a function that loads them, or none at all.
    """
    if checkpoints is None:
        models, weights = [model], [1.0]
    else:
        if load is None or not checkpoints:
            raise InputError(
                "checkpoints need a function that loads one into a model and gives its weight, and there "
                "must be one or more: give both, or neither"
            )
        models = [deepcopy(model) for _ in checkpoints]
        given = [load(copy, one) for copy, one in zip(models, checkpoints, strict=True)]
        weights = [1.0 if weight is None else float(weight) for weight in given]
    losses = [None if loss_fn is None else SupervisedLoss(one, loss_fn) for one in models]
    subjects = [subject_of(one, loss=loss, **options) for one, loss in zip(models, losses, strict=True)]
    return Attributed(subjects, weights, Rows(train), method)
