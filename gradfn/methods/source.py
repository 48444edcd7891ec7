"""SOURCE: what a row did to a query by way of the training between them, from a few checkpoints of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from gradfn.engine.stream import Progress, collect, lengths_of
from gradfn.errors import InputError
from gradfn.linalg.spectrum import Damping, Spectrum
from gradfn.methods.attribution import Queries, Scorer, weighted_sum
from gradfn.methods.dynamics import Dynamics
from gradfn.methods.grad_dot import grad_dot
from gradfn.model.losses import CausalLMLoss, ModelLoss
from gradfn.model.sites import find_sites
from gradfn.statistics import Curvature, ekfac
from gradfn.statistics.fold import Additive, TwoPass, fit_sums, passes
from gradfn.statistics.labels import Relabelled, sample_labels
from gradfn.subject import Subject, row_weights
from gradfn.transforms import Transform, adafactor, adam, chain
from gradfn.transforms.precondition import digest_of
from gradfn.transforms.row_sum import FactorSum
from gradfn.types import Blocks, Data, Rows
from gradfn.watch import WATCH

Labels = Literal["data", "model"]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A state that a training went through, and the steps that it stands for.

    Args:
        subject: the model there, with its losses; or a function that loads it, called whenever it is needed.
        rate: the sum of the learning rates of these steps, as they were after warmup and schedule.
        scale: of an adaptive optimizer: gives its scaling of gradients there, `adam(v, eps)`, of a subject.

    Raises:
        InputError: a sum that is not above 0.
    """

    subject: Subject | Callable[[], Subject]
    rate: float
    scale: Callable[[Subject], Transform] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.rate < float("inf"):
            raise InputError(
                "each checkpoint stands for steps whose learning rates have a sum above 0, not "
                f"{self.rate}: leave out checkpoints that stand for none"
            )

    def load(self) -> Subject:
        """The subject, seen by row."""
        subject = self.subject if isinstance(self.subject, Subject) else self.subject()
        return replace(subject, view=replace(subject.view, tokens=False))

    def steps(self) -> Blocks:
        """`P` of every block, what the optimizer multiplies a gradient by."""
        assert self.scale is not None
        subject = self.load()
        sites = find_sites(subject.model, subject.view)
        like = {site.block: site.weight for site in sites}
        ones = {site.block: like[site.block].new_ones(1, *site.spec.shape).detach() for site in sites}
        scaled = self.scale(subject)(ones)
        assert isinstance(scaled, dict)
        return {name: G[0] for name, G in scaled.items()}


@dataclass(frozen=True, eq=False)
class Segment:
    """Steps during which the curvature and the gradients of rows are taken for constant.

    Args:
        checkpoints: in the order of the training. Gradients of rows are their mean, weighted by their rates.
        curvature: `H` of every block, of the objective that the steps minimised: what `fit_curvature` gives,
            or any spectra. With an optimizer's scaling, `P^1/2 H P^1/2`.

    Raises:
        InputError: no checkpoint; a scaling at some of them alone.
    """

    checkpoints: Sequence[Checkpoint]
    curvature: Mapping[str, Spectrum] = field(repr=False)

    def __post_init__(self) -> None:
        if len({one.scale is None for one in self.checkpoints}) != 1:
            raise InputError(
                "a segment has one checkpoint or more, each with the optimizer's scaling, or none with it: "
                "give them alike"
            )

    @property
    def rate(self) -> float:
        """The sum of the learning rates of its steps."""
        return sum(one.rate for one in self.checkpoints)

    @cached_property
    def divisor(self) -> Blocks | None:
        """See `divisor_of`."""
        return divisor_of(self.checkpoints)

    def back(self, dynamics: Dynamics, adjoint: Sequence[Blocks]) -> list[Blocks]:
        """The states of queries before it, from those after it, and at the end what its rows meet."""
        made: list[Blocks] = [{} for _ in range(dynamics.states + 1)]
        for name, G in adjoint[0].items():
            if name not in self.curvature:
                raise InputError(f"no curvature for {name}: fit it on all layers that are scored")
            root = None if self.divisor is None else self.divisor[name].to(G).sqrt()
            after = [one[name] if root is None else one[name] / root for one in adjoint]
            *before, met = dynamics.back(self.curvature[name], self.rate, after)
            if root is not None:
                before, met = [one * root for one in before], met / root
            for blocks, one in zip(made, (*before, met), strict=True):
                blocks[name] = one
        return made


@dataclass(frozen=True, eq=False)
class Source:
    """`score(z, q) = c_z sum_l < S_{l+1} .. S_L grad q, F_l g_l(z) >` over the segments of a training.

    `S_l` is what a segment leaves of a displacement, and `F_l` what it makes of a steady push; both are
    functions of the segment's curvature, see `Dynamics`. `g_l` is the gradient of the row's own loss, `c_z`
    the row's weight in the mean that a step takes. All functions are on the queries' side: rows stay raw. No
    inverse is taken, so nothing is damped.

    The queries' gradients are made at the subject that is scored, which is the end of the training.

    Args:
        segments: in the order of the training.
        dynamics: of the optimizer.

    Raises:
        InputError: no segment; an adaptive optimizer without its scaling, or the other way round.

    Source: Bae et al., arXiv:2405.12186, section 3.
    """

    segments: Sequence[Segment]
    dynamics: Dynamics = field(default_factory=Dynamics)

    def __post_init__(self) -> None:
        if not self.segments:
            raise InputError("source goes through segments of a training: give one or more")
        for segment in self.segments:
            check_scaled(self.dynamics, segment.checkpoints)

    @property
    def damping(self) -> tuple[Damping | None, ...]:
        """Nothing is damped."""
        return (None,)

    def back(self, queries: Blocks) -> Iterator[tuple[Segment, Blocks]]:
        """The segments from the last to the first, and what the gradients of rows meet in each.

        Args:
            queries: gradients at the end of the training.
        """
        adjoint = self.dynamics.begin(queries)
        for segment in reversed(self.segments):
            *adjoint, met = segment.back(self.dynamics, adjoint)
            yield segment, met

    def scorer(self, subject: Subject, query: Queries, *, by_block: bool = False) -> Scorer:
        """See `Attribution`; all checkpoints are loaded.

        Raises:
            InputError: no examples as queries; scores by block.
        """
        if query is None or isinstance(query, dict):
            raise InputError("source follows the queries themselves back from the end: give examples")
        if by_block:
            raise InputError("source gives no shares of blocks: score by example or token")
        queries = collect(subject.for_queries(), query)
        assert isinstance(queries, dict)
        parts = [(one, segment, met) for segment, met in self.back(queries) for one in segment.checkpoints]
        scorers = [
            grad_dot().scorer(replace(one.load(), view=subject.view), met) for one, _, met in reversed(parts)
        ]
        weights = [one.rate / segment.rate for one, segment, _ in reversed(parts)]

        def score(train: Data, rows: range | None = None, *, progress: Progress | None = None) -> Rows:
            made = [scorer(train, rows, progress=progress) for scorer in scorers]
            shares = shares_of(subject, train, self.dynamics, rows)
            return Rows(weighted_sum(made, weights) * shares[:, None].to(made[0].losses), made[-1].losses)

        return score

    def settings(self) -> dict[str, Any]:
        """The optimizer, the rates, and digests of the curvatures."""
        parts = [
            {"rates": [one.rate for one in segment.checkpoints], "curvature": digest_of(segment.curvature)}
            for segment in self.segments
        ]
        return {"source": {**self.dynamics.settings(), "segments": parts}}


def source(
    checkpoints: Sequence[Checkpoint],
    train: Data,
    *,
    segments: int = 3,
    dynamics: Dynamics | None = None,
    fold: Additive[Curvature] | TwoPass[Curvature] | None = None,
    labels: Labels = "model",
    seed: int = 0,
    partitions: int = 1,
) -> Source:
    """Fit what SOURCE needs, a curvature a segment.

    Args:
        checkpoints: in the order of the training, each with the steps that it stands for.
        train: the training rows.
        segments: into how many the checkpoints are cut, about equally many in each.
        dynamics, fold, labels, seed, partitions: see `fit_curvature`; None: those of plain SGD.

    >>> import gradfn as gf
    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> def loss(params, e):
    ...     return (torch.func.functional_call(net, params, e["x"]) - e["y"]).square().sum() / 2
    >>> data = [{"x": torch.randn(2), "y": torch.randn(1)} for _ in range(5)]
    >>> at = Checkpoint(Subject(net, loss), rate=0.5)
    >>> method = source([at, at], data, segments=2, labels="data")
    >>> gf.score(net, data, data[:3], method=method, loss=loss).matrix.shape
    torch.Size([5, 3])

    Source: Bae et al., arXiv:2405.12186, section 3.
    """
    dynamics = dynamics or Dynamics()
    parts = cut(checkpoints, segments)
    fit = partial(fit_curvature, train=train, dynamics=dynamics, fold=fold, labels=labels, seed=seed,
                  partitions=partitions)  # fmt: skip
    return Source([Segment(part, fit(part)) for part in parts], dynamics)


def cut(checkpoints: Sequence[Any], segments: int) -> list[list[Any]]:
    """The checkpoints in so many runs, about equally many in each.

    Raises:
        InputError: more segments than checkpoints, or none.

    >>> cut("abcde", 2)
    [['a', 'b'], ['c', 'd', 'e']]
    """
    if not 1 <= segments <= len(checkpoints):
        raise InputError(
            f"`segments` must be between 1 and the number of checkpoints, {len(checkpoints)}, not {segments}"
        )
    bounds = [len(checkpoints) * number // segments for number in range(segments + 1)]
    return [list(checkpoints[start:stop]) for start, stop in pairwise(bounds)]


def fit_curvature(
    checkpoints: Sequence[Checkpoint],
    train: Data,
    dynamics: Dynamics,
    *,
    fold: Additive[Curvature] | TwoPass[Curvature] | None = None,
    labels: Labels = "model",
    seed: int = 0,
    partitions: int = 1,
) -> Curvature:
    """The curvature of the training objective over the checkpoints of a segment, weighted by their rates.

    A fold takes the mean of `g gᵀ` over rows. Where a row's loss is a mean over t tokens, whose labels are
    drawn from the model, its Hessian is t times the expected `g gᵀ`. Rows therefore count `c_z t_z` times,
    by weights on their losses. With an optimizer's scaling P, it is `P^1/2 H P^1/2`: eigenvectors of K-FAC
    come from a factored `P^1/2`, as of an Adafactor, and eigenvalues and dense matrices from P itself.

    Args:
        checkpoints: of one segment.
        train: the training rows.
        dynamics: what a step takes the mean over.
        fold: `kfac()`, `second_moment()` or another curvature; None: `ekfac()`.
        labels: drawn from the "model", with `seed`, or of the "data", whose curvature vanishes with the loss.
        partitions: see `gradfn.fit`.

    Raises:
        InputError: a loss of which no labels can be drawn, or that takes no weights where tokens are weighed;
            rows with weights of their own; a fold that gives no curvature.
    """
    fold = ekfac() if fold is None else fold
    if not getattr(fold, "gives_curvature", False):
        raise InputError(f"{fold} is no curvature: give ekfac(), kfac() or second_moment(), say")
    check_scaled(dynamics, checkpoints)
    divisor, whole = divisor_of(checkpoints), sum(one.rate for one in checkpoints)
    data = [_weighed(one.load(), train, dynamics, labels, seed) for one in checkpoints]
    tokens = int(lengths_of(train).sum()) * passes(fold) * partitions * len(data)

    def run(fold: Additive[Any], progress: Progress) -> Any:
        state, behind = fold.init(), _behind(fold, divisor)
        for one, rows in zip(checkpoints, data, strict=True):
            sums = fit_sums(fold, one.load(), rows, behind, partitions=partitions, progress=progress)
            for total in sums.blocks.values():
                total.mul_(one.rate / whole * len(data))
            state = fold.add(state, sums)
        return fold.finalize(state)

    with WATCH.get()("curvature", tokens, "tokens", then="decompositions and scores") as progress:
        if isinstance(fold, TwoPass):
            return run(fold.then(run(fold.first, progress)), progress)
        return run(fold, progress)


def shares_of(
    subject: Subject, train: Data, dynamics: Dynamics, rows: range | None = None
) -> Float64[Tensor, " rows"]:
    """What a row's loss is multiplied by in the objective; by token, once for each token."""
    shares = row_weights(subject.loss, train, np.arange(len(train)), dynamics.normalize)
    own = range(len(train)) if rows is None else rows
    shares = shares[own.start : own.stop]
    if not subject.view.tokens:
        return shares
    return shares.repeat_interleave(torch.from_numpy(lengths_of(train)[own.start : own.stop]))


def divisor_of(checkpoints: Sequence[Checkpoint]) -> Blocks | None:
    """`1 / P` of every block, P the mean of the optimizer's scaling; None: it does not scale."""
    if checkpoints[0].scale is None:
        return None
    whole, found = sum(one.rate for one in checkpoints), dict[str, Tensor]()
    for one in checkpoints:
        for name, P in one.steps().items():
            found[name] = found.get(name, 0.0) + P.double() * (one.rate / whole)
    return {name: P.reciprocal() for name, P in found.items()}


def check_scaled(dynamics: Dynamics, checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse an adaptive optimizer whose scaling is not given, and a scaling of one that has none."""
    scaled = any(one.scale is not None for one in checkpoints)
    if scaled != (dynamics.optimizer != "sgd"):
        what = "scales no gradients: leave `scale` out" if scaled else "scales gradients: give `scale`"
        raise InputError(f"{dynamics.optimizer} {what} of the checkpoints")


def _behind(fold: Additive[Any], divisor: Blocks | None) -> Transform:
    """`P^1/2`, factored where the fold is of factors, to which nothing else can be done."""
    if divisor is None:
        return chain()
    factors = isinstance(chain(fold.stage()).stages[-1], FactorSum)
    return adafactor(divisor, eps=0.0) if factors else adam(divisor, eps=0.0)


def _weighed(subject: Subject, train: Data, dynamics: Dynamics, labels: Labels, seed: int) -> Data:
    """The rows, with labels, whose second moment of gradients is the curvature of the objective."""
    loss, size, count = subject.loss, subject.token_batch_size, len(train)
    if count and "weight" in train[0]:
        raise InputError("rows with weights of their own have no curvature for source: leave the weights out")
    data = train if labels == "data" else sample_labels(loss, train, seed, token_batch_size=size)
    times = count * row_weights(loss, train, np.arange(count), dynamics.normalize)
    mean = getattr(loss, "reduction", "mean" if dynamics.normalize == "tokens" else None) == "mean"
    if mean and hasattr(train, "supervised"):
        times = times * torch.from_numpy(np.asarray(train.supervised))  # pyright: ignore
    if bool((times == 1).all()):
        return data
    if not isinstance(loss, CausalLMLoss | ModelLoss):
        raise InputError(
            "rows count by their tokens here, and only the losses of causal_lm_loss and model_loss take "
            "weights: give one of these"
        )
    return Relabelled(data, [{"weight": weight} for weight in times.sqrt()])
