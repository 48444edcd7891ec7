"""Inner products of gradients in the geometry of a curvature: what most attribution methods are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from gradfn.engine import Engine, collect, gather, probe_engine
from gradfn.engine.stream import Progress
from gradfn.errors import InputError
from gradfn.linalg.spectrum import Damping, Spectrum
from gradfn.memory import check_memory
from gradfn.methods.attribution import Attribution, Joined, Queries
from gradfn.subject import Subject
from gradfn.transforms import Dot, SelfDot, Transform, UnitNormalize, chain, dot, unit_normalize
from gradfn.transforms.precondition import Rotate, RotateFlat, digest_of, precondition
from gradfn.types import Blocks, Data, Rows

Norm = Literal["none", "cosine", "relative"]


@dataclass(frozen=True)
class InnerProduct:
    """`score(z, q) = <R grad z, Q grad q>`, in the geometry of a curvature: an `Attribution`.

    With a curvature H, an inner product takes `H^-1` on the query alone; a cosine takes `H^-1/2` on
    both sides and the norm after it. The rows are only rotated into the eigenbasis; powers and dampings are
    in what they are compared with, so several dampings cost one pass.

    Args:
        row_transform: `R`, what is done to the gradients of training rows, before any curvature.
        query_transform: `Q`, what is done to the gradients of queries, before any curvature.
        curvature: one spectrum a block, of what `row_transform` and `query_transform` give.
        damping: of the curvature; for several, scores come for each of them.
        norm: "cosine" instead of an inner product, taken in the geometry of the curvature if there is one;
            "relative" divides an inner product by `|H^-1 g|` of the row, which keeps outliers from being
            everyone's proponents (RelatIF).
        solve: instead of a curvature: any other map of the queries, all at once.

    Source: RelatIF: Barshan et al., arXiv:2003.11630, section 4.
    """

    row_transform: Transform
    query_transform: Transform
    curvature: Mapping[str, Spectrum] | None = field(default=None, repr=False)
    damping: tuple[Damping | None, ...] = (Damping(),)
    norm: Norm = "none"
    solve: Callable[[Blocks], Blocks] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.damping:
            raise InputError("a method needs one damping or more (None is the pseudo-inverse)")
        if self.curvature is None and len(self.damping) > 1:
            raise InputError("several dampings need a curvature: fit one")
        if self.curvature is not None and self.solve is not None:
            raise InputError("a method has a curvature or solves for its queries, not both: leave one out")

    def against(self, queries: Blocks, *, by_block: bool = False) -> Transform:
        """What turns gradients of training rows into scores `[rows, dampings * queries]`.

        Args:
            queries: gradients of the queries after `query_transform`.
            by_block: keep each block's share apart, see `dot`.
        """
        H, one = self.curvature, next(iter(queries.values()))
        size, copies = sum(G.nbytes for G in queries.values()), len(self.damping) + (self.norm != "none")
        check_memory(
            size * copies, f"{copies} copies of the gradients of {len(one):,} queries",
            "ask fewer queries at a time, or project the gradients", one.device,
        )  # fmt: skip
        queries = self.solve(queries) if self.solve else queries
        if H is None:
            queries = unit_normalize()(queries) if self.norm == "cosine" else queries
            match chain(self.row_transform).stages:
                case (*stages, UnitNormalize()):  # scores are divided, and not every number of a row
                    return chain(*stages, Dot(queries, unit=True, by_block=by_block))
            return chain(self.row_transform, Dot(queries, unit=self.norm != "none", by_block=by_block))
        if self.norm == "none":
            return chain(self.row_transform, dot(self._powers(queries), by_block=by_block))
        rotate = chain(Rotate(H), RotateFlat(H))
        parts = [self._compared(rotate(queries), damping) for damping in self.damping]  # pyright: ignore
        targets, weights = (_joined([part[i] for part in parts]) for i in (0, 1))
        return chain(self.row_transform, rotate, Dot(targets, unit=True, by_block=by_block, weights=weights))

    def sides(self) -> tuple[Transform, Callable[[Blocks], Blocks]]:
        """What is done to rows and to queries, so that scores are plain inner products, `<A z, B q>`.

        An inner product has `A = R` and `B = H^-1`, for every damping one after the other, so rows are the
        same for all curvatures. A cosine has `unit(H^-1/2 .)` on both sides, and RelatIF `A = unit(H^-1 R .)`
        and `B = 1`.

        Returns:
            `A`, of rows' gradients before `row_transform`; `B`, of queries' gradients after
            `query_transform`.

        Raises:
            InputError: several dampings where rows are normalised behind the curvature.

        >>> InnerProduct(chain(), chain(), norm="cosine").sides()
        (Chain(stages=(UnitNormalize(),)), Chain(stages=(UnitNormalize(),)))
        """
        H, solve = self.curvature, self.solve or chain()
        if self.norm == "none":
            if H is None:
                return chain(self.row_transform), solve  # pyright: ignore[reportReturnType]
            return chain(self.row_transform), self._powers
        if len(self.damping) > 1:
            raise InputError(
                "rows that are normalised behind a curvature are others for each damping: give one `damping`"
            )
        power = -0.5 if self.norm == "cosine" else -1.0
        unit = chain(*([] if H is None else [precondition(H, power, *self.damping)]), unit_normalize())
        rows = chain(self.row_transform, unit)
        if self.norm == "relative":
            return rows, solve  # pyright: ignore[reportReturnType]
        return rows, unit if self.solve is None else lambda queries: unit(solve(queries))  # pyright: ignore

    def _powers(self, queries: Blocks) -> Blocks:
        """`H^-1 q`, for every damping one after the other."""
        assert self.curvature is not None
        return _joined([precondition(self.curvature, -1.0, damping)(queries) for damping in self.damping])

    def _compared(self, queries: Blocks, damping: Damping | None) -> tuple[Blocks, Blocks]:
        """In the eigenbasis: what rows meet, and the weights of the numbers in their norm, `[1, ...]`.

        Cosine: `<W g, u> / |W g|`, `W = H^-1/2`, `u = W q / |W q|`. Relative: `<g, H^-1 q> / |H^-1 g|`.
        """
        assert self.curvature is not None
        power = -0.5 if self.norm == "cosine" else -1.0
        weights = {name: self.curvature[name].power(power, damping) for name in queries}
        targets = {name: G * weights[name].to(G) for name, G in queries.items()}
        if self.norm == "cosine":
            targets = {name: G * weights[name].to(G) for name, G in unit_normalize()(targets).items()}
        return targets, {name: w[None] for name, w in weights.items()}

    def against_itself(self, *, by_block: bool = False) -> Transform:
        """What turns gradients of rows into their self-influence `<g, H^-1 g>`, `[rows, dampings]`.

        Raises:
            InputError: a method that solves for the queries at hand.
        """
        if self.solve is not None:
            raise InputError(
                "this method solves for given queries, so it has no self-influence: use ekfac, say"
            )
        if self.curvature is None:
            return chain(self.row_transform, SelfDot(by_block=by_block))
        H = self.curvature
        powers = [{name: one.power(-0.5, d)[None] for name, one in H.items()} for d in self.damping]
        return chain(self.row_transform, Rotate(H), RotateFlat(H), SelfDot(_joined(powers), by_block))

    def scorer(self, subject: Subject, query: Queries, *, by_block: bool = False) -> "EngineScorer":
        """See `Attribution`; gradients of queries are those after `query_transform`."""
        if query is None:
            scores = self.against_itself(by_block=by_block)
        else:
            gradients = query if isinstance(query, dict) else self._gradients(subject, query)
            scores = self.against(on_device_of(subject.model, gradients), by_block=by_block)
        engine = probe_engine(subject.model, subject.loss, scores, view=subject.view)
        return EngineScorer(engine, subject.token_batch_size)

    def _gradients(self, subject: Subject, query: Data) -> Blocks:
        gradients = collect(subject.for_queries(), query, self.query_transform)
        if not isinstance(gradients, dict):
            raise TypeError("the method's query_transform must give blocks, not scores")
        return gradients

    def settings(self) -> dict[str, Any]:
        """The norm, and a digest of the curvature with its dampings; transforms tell theirs themselves.

        >>> InnerProduct(chain(), chain()).settings()
        {'norm': 'none', 'curvature': None}
        """
        H = self.curvature
        if H is None:
            # A function tells nothing of itself; a map of the queries may have settings, as transforms do.
            settings = getattr(self.solve, "settings", None)
            return {
                "norm": self.norm,
                "curvature": None,
                **({} if settings is None else {"solve": settings()}),
            }
        dampings = [None if damping is None else str(damping) for damping in self.damping]
        return {"norm": self.norm, "curvature": digest_of(H), "damping": dampings}


@dataclass(frozen=True, eq=False)
class EngineScorer:
    """A `Scorer` that is an engine whose transform ends in inner products with the queries."""

    engine: Engine
    token_batch_size: int

    def __call__(self, train: Data, rows: range | None = None, *, progress: Progress | None = None) -> Rows:
        return gather(
            self.engine, train, rows=rows, token_batch_size=self.token_batch_size, progress=progress
        )


def _joined(parts: Sequence[Blocks]) -> Blocks:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def on_device_of(model: nn.Module, blocks: Blocks) -> Blocks:
    """Blocks on the device where the model's gradients are made."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in blocks.items()}


def damping_names(method: Attribution) -> tuple[str, ...]:
    """The dampings that scores come for, as the command line spells them; `("",)` where none is chosen.

    >>> from gradfn.methods import grad_dot
    >>> damping_names(grad_dot())
    ('',)
    """
    if isinstance(method, Joined):
        return damping_names(method.parts[0][1])
    plain = method.curvature is None if isinstance(method, InnerProduct) else method.damping == (None,)
    if plain:
        return ("",)
    return tuple("none" if damping is None else str(damping) for damping in method.damping)
