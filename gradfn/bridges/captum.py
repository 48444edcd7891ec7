"""Captum's interface of influence, with gradfn's methods behind it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

from jaxtyping import Float
from torch import Tensor, nn

from gradfn.bridges.supervised import Load, Options, attributed, package, rows_of
from gradfn.errors import InputError
from gradfn.methods import Attribution, grad_dot
from gradfn.scores import top_k


class KMostInfluentialResults(NamedTuple):
    """The best rows of every query, best first, named as Captum names them; both `[queries, k]`."""

    indices: Tensor
    influence_scores: Tensor


class Influence:
    """A `captum.influence.DataInfluence` whose influences are gradfn's scores, called as `TracInCP` is.

    With `gf.grad_dot()`, `view=gf.View(include=["*"])` and the same checkpoints it is TracInCP:
    `sum_m w_m <grad l(query; theta_m), grad l(row; theta_m)>`.

    Args:
        model: takes the inputs of a batch.
        train_dataset: tuples `(input, ..., label)`.
        loss_fn: of outputs and labels, `torch.nn.CrossEntropyLoss()` say; of one row at a time, so mean, sum
            and "none" are the same.
        method: its name or what it is, see `gf.score`; a method by its name is fitted once.
        checkpoints: anything that `checkpoints_load_func` takes; None: the model as it is, with weight 1.
            Each is loaded into a copy of the model, and all are held.
        checkpoints_load_func: loads one into a model and gives its weight, the learning rate say.
        options: `view`, `token_batch_size`; see `Subject`.

    Raises:
        InputError: Captum is not installed; checkpoints without a function that loads them.

    Source: TracIn, Pruthi et al., arXiv:2002.08484.
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        *,
        method: Attribution | str = grad_dot(),  # noqa: B008
        checkpoints: Sequence[Any] | None = None,
        checkpoints_load_func: Load | None = None,
        **options: Unpack[Options],
    ):
        package("captum.influence").DataInfluence.register(type(self))
        self.model, self.train_dataset = model, train_dataset
        self._attributed = attributed(
            model, train_dataset, loss_fn, method, checkpoints, checkpoints_load_func, **options
        )

    @classmethod
    def get_name(cls) -> str:
        """What Captum calls it."""
        return cls.__name__

    def influence(
        self,
        inputs: Any,
        k: int | None = None,
        proponents: bool = True,
        unpack_inputs: bool = True,
        show_progress: bool = False,
    ) -> Tensor | KMostInfluentialResults:
        """The score of every training row for every query, or the best rows of each.

        Args:
            inputs: a batch `(input, ..., labels)`, or a DataLoader of such.
            k: how many of the best; None: all scores.
            proponents: the highest; False: the lowest, lowest first.
            unpack_inputs: that each part of the batch but the last is an input of its own, which it must be.
            show_progress: taken because Captum's classes take it; nothing is shown.

        Returns:
            Scores `[queries, rows]`; with `k`, a named tuple of `indices` and `influence_scores`,
            `[queries, k]`.

        Raises:
            InputError: `unpack_inputs=False`.
        """
        if not unpack_inputs:
            raise InputError("a batch is a tuple of inputs and labels: leave out `unpack_inputs`")
        scores = self._attributed.scores(rows_of(inputs))
        if k is None:
            return scores
        best = top_k([scores.T], k, largest=proponents)
        return KMostInfluentialResults(best.rows, best.scores)

    def self_influence(self, inputs: Any = None, show_progress: bool = False) -> Float[Tensor, " rows"]:
        """The score of every row for itself.

        Args:
            inputs: a batch, or a DataLoader; None: the training rows.
            show_progress: taken because Captum's classes take it; nothing is shown.
        """
        return self._attributed.self_influence(None if inputs is None else rows_of(inputs))
