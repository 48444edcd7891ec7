"""dattri's ground truth, of its benchmarks or of a retraining of one's own, as gradfn's."""

from collections.abc import Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

from gradfn.errors import InputError
from gradfn.evaluate import Truth


def truth(
    ground_truth: tuple[Tensor, Tensor],
    rows: int,
    metric: str = "lds",
    *,
    row_ids: Sequence[str] | None = None,
    query_ids: Sequence[str] | None = None,
) -> Truth:
    """Retrained models' losses as dattri holds them, for `gf.evaluate`.

    dattri's `lds` correlates sums of scores with its values, which are minus the target (the loss, say), and
    `loo_corr` correlates scores with the targets themselves where a row is left out. In a `Truth` both are
    losses: `-values` of "lds", `values` of "loo".

    Args:
        ground_truth: the pair that `load_benchmark` gives second, and `calculate_lds_ground_truth` and
            `calculate_loo_ground_truth` give: values `[models, queries]`; and, of "lds", the numbers of the
            rows that each model was trained on, `[models, size]`, of "loo" the row that it lacks, `[models]`.
        rows: how many training rows there are.
        metric: "lds" or "loo".
        row_ids, query_ids: names; None: numbers.

    Returns:
        A truth of one model a subset, whose settings tell where it is from.

    Raises:
        InputError: a pair of other shapes; numbers that are not of rows, or come twice in a subset.

    >>> of_dattri = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0, 1], [1, 2], [0, 2]])
    >>> truth(of_dattri, rows=3).targets()[1].T
    tensor([[-1., -2., -3.]], dtype=torch.float64)

    Source: dattri, Deng et al., arXiv:2410.04555.
    """
    values, numbers = ground_truth
    if metric not in ("lds", "loo"):
        raise InputError(f"no metric {metric!r}: choose lds or loo")
    if values.ndim != 2 or numbers.ndim != (2 if metric == "lds" else 1) or len(numbers) != len(values):
        raise InputError(
            f"the ground truth of {metric} has shapes {list(values.shape)} and {list(numbers.shape)}, "
            f"expected [models, queries] and {'[models, size]' if metric == 'lds' else '[models]'}: give "
            "the pair that dattri gives, and its metric"
        )
    which = numbers.long().cpu().reshape(len(values), -1)
    subsets = _masks(which, rows)
    models, losses = len(values), values.double().cpu()
    return Truth(
        subsets=subsets if metric == "lds" else ~subsets,
        numbers=torch.arange(models),
        seeds=torch.zeros(models, dtype=torch.int64),
        losses=-losses if metric == "lds" else losses,
        train_losses=torch.full((models,), torch.nan, dtype=torch.float64),
        diverged=~losses.isfinite().all(1),
        row_ids=_names(row_ids, rows, "row_ids"),
        query_ids=_names(query_ids, values.shape[1], "query_ids"),
        settings={"made_by": "dattri", "metric": metric},
    )


def _masks(which: Shaped[Tensor, "models size"], rows: int) -> Tensor:
    """The rows of every subset as a mask."""
    if which.numel() and not 0 <= int(which.min()) <= int(which.max()) < rows:
        raise InputError(
            f"the ground truth has rows {int(which.min())} to {int(which.max())}, and there are {rows:,}: "
            "give as many `rows` as the models were trained on"
        )
    masks = torch.zeros(len(which), rows, dtype=torch.bool).scatter_(1, which, True)
    if (masks.sum(1) != which.shape[1]).any():
        raise InputError("a subset of the ground truth has a row twice, which no mask says: leave it out")
    return masks


def _names(given: Sequence[str] | None, count: int, argument: str) -> list[str]:
    names = [str(number) for number in range(count)] if given is None else list(given)
    if len(names) != count:
        raise InputError(f"`{argument}` has {len(names):,} names, expected {count:,}: give one for each")
    return names
