"""Gradients of rows collected while a model trains, in a loop of the caller's own.

A backward pass gives the part that a row has in the gradient of the loss of a step, `kappa g_i`. A record is
`g_i`, the gradient of the row's own loss, at the parameters before the step:

    kappa_i = dL / dl_i        L: what backward is called on;  l_i: the row's own loss
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradfn.engine.stream import lengths_of
from gradfn.engine.tap import Tapped, tap
from gradfn.errors import InputError, StorageError
from gradfn.model.sites import View
from gradfn.runs.gradients import GRADIENTS
from gradfn.runs.provenance import RECORDED, Provenance, describe_model
from gradfn.runs.shards import Shard, shard_run
from gradfn.runs.visits import VisitLog, joined
from gradfn.store import Values, storable
from gradfn.store.directory import segments_of
from gradfn.store.file import read_header
from gradfn.store.growing import open_growing
from gradfn.train.parts import RecordOptions, SelfCheck, Stages, stages_of
from gradfn.transforms import Transform, chain
from gradfn.types import Blocks, Data

__all__ = ["Recorder", "recording", "trained_model"]


@contextmanager
def recording(
    model: nn.Module, run: str | Path, data: Data | None = None, **options: Unpack[RecordOptions]
) -> Iterator["Recorder"]:
    """Write the gradient of every row that a training visits to `RUN/store.h5`.

    The training stays as it is, to the bit. Tell the recorder the losses of each batch before backward, and
    the end of each step. Forward passes under `torch.no_grad()` are left alone. The store is read like any
    other; a row of it is a visit, see `gradfn.runs.visits`. Of several processes each writes a shard, and
    `merge_run` joins them.

    Args:
        model: what is trained; in DistributedDataParallel or a PEFT model or not.
        run: the run directory. Where training resumes, give `start`.
        data: the rows, for their names and lengths; None: the names are their numbers.
        options: see `RecordOptions`.

    Raises:
        InputError: a compiled model; a weight that probes cannot see; at the first batch, rows that do not
            add up to the gradient; a run that was made with other settings, or is being written.
        StorageError: the disk is full, at the end of a step; what was recorded is kept.

    >>> import tempfile
    >>> import gradfn as gf
    >>> net, run = nn.Linear(2, 1, bias=False), tempfile.mkdtemp()
    >>> with recording(net, run) as rec:
    ...     losses = rec.loss(net(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).sum(1), rows=[7, 8])
    ...     losses.mean().backward()
    ...     rec.step()
    >>> with gf.open_store(run) as store:
    ...     store.read("rows/id").tolist(), store.read("gradients/root")[:, 0].tolist()
    (['7', '8'], [[1.0, 0.0], [0.0, 2.0]])
    """
    inner = trained_model(model)
    stages = stages_of(inner, options)
    scaled = [stages.scale] if stages.scale else []
    made = _describe(inner, data, chain(*scaled, options.get("transform") or chain()), options)
    start, overwrite, folder = options.get("start", 0), options.get("overwrite", False), _own_run(run)
    if start and not overwrite:
        made = _as_begun(folder, made)
    with (
        tap(inner, stages.inside, view=options.get("view")) as tapped,
        tapped.called_by(model),
        open_growing(folder, "store", made.settings(), overwrite, made.request) as writer,
    ):
        log = VisitLog(writer)
        log.resume(start, again=options.get("again", False))
        names = _Names(data)
        recorder = Recorder(tapped, log, names, stages, options.get("dtype", torch.float32), start)
        recorder._check = SelfCheck.begin(tapped, stages.inside)
        try:
            yield recorder
        except BaseException:
            with suppress(StorageError):
                log.finish(recorder.end or "stopped")
            raise
        log.finish(recorder.end or "complete")


# --- what is recorded of one batch


@dataclass(eq=False)
class _Batch:
    """The rows of one forward pass, and what backward tells of their losses."""

    rows: np.ndarray
    weights: Tensor | None
    losses: Tensor
    names: Sequence[str] | None
    lengths: np.ndarray | None
    kappa: list[Tensor] = field(default_factory=list)

    def factors(self) -> Tensor:
        """`kappa_i` of every row.

        Raises:
            InputError: backward was not called on the loss.
        """
        if not self.kappa:
            raise InputError(
                "the loss that `loss` was told of had no backward pass: call backward on what `loss` "
                "returns, before `step`"
            )
        kappa = torch.stack(self.kappa).sum(0).float()
        return kappa if self.weights is None else kappa * self.weights.to(kappa)


@dataclass(eq=False)
class Recorder:
    """Records the steps of a training; see `recording`.

    Attributes:
        number: the step that is next, from 0.
        end: what the store says of the end of the training; None: "complete", or "stopped" by an error.
    """

    tapped: Tapped
    log: VisitLog
    names: "_Names"
    stages: Stages
    dtype: torch.dtype
    number: int = 0
    end: str | None = None
    _opened: list[_Batch] = field(default_factory=list)
    _made: list[tuple[Blocks, dict[str, Values]]] = field(default_factory=list)
    _microstep: int = 0
    _scaled: bool = False
    _check: SelfCheck | None = None

    def loss(
        self,
        loss: Tensor,
        rows: Sequence[int] | np.ndarray | Tensor,
        *,
        counts: Tensor | None = None,
        total: float | Tensor | None = None,
        losses: Tensor | None = None,
        names: Sequence[str] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Tell the losses of a batch, after its forward pass and before its backward pass.

        Args:
            loss: the loss of each row, `[rows]`, of which you make any scalar; or one number,
                `sum_i counts_i l_i / total`.
            rows: their numbers in the data.
            counts: how often each row's own loss is in `loss`, such as its supervised tokens; None: once.
            total: what that sum was divided by; None: the sum of `counts`.
            losses: the rows' own losses, where `loss` is one number: these are recorded.
            names, lengths: of the rows, instead of those that the data says.

        Returns:
            `loss`, to go on with.

        Raises:
            InputError: as many losses as rows, or one, were expected.
        """
        numbers = np.asarray(rows.tolist() if isinstance(rows, Tensor) else rows, np.int64)
        if loss.ndim > 1 or (loss.ndim == 1 and len(loss) != len(numbers)) or numbers.ndim != 1:
            raise InputError(
                f"expected the losses of {numbers.size} rows, or one number, got the shape "
                f"{list(loss.shape)}: give the loss of each row, such as reduction='none' does"
            )
        if not loss.requires_grad:
            raise InputError("the loss has no gradient: call the model with gradients enabled")
        weights, own = None, loss.detach()
        if loss.ndim == 0:
            counts = torch.ones(len(numbers)) if counts is None else counts.detach()
            counts = counts.double()  # a total need not be whole: several processes share it
            whole = counts.sum() if total is None else torch.as_tensor(total).to(counts)
            weights = counts / torch.where(whole == 0, 1.0, whole)
            own = own.new_full((len(numbers),), torch.nan) if losses is None else losses.detach()
        if self.stages.scale is not None and not self.stages.late and not (self._opened or self._made):
            self._scaled = self.stages.scale.read()
        sizes = None if lengths is None else np.asarray(lengths, np.int64)
        batch = _Batch(numbers, weights, own, names, sizes)
        loss.register_hook(batch.kappa.append)
        self._opened.append(batch)
        return loss

    def substep(self) -> None:
        """Take the rows of the backward passes so far, so that their gradients need not wait for the step."""
        if not self._opened:
            return
        blocks: Any = self.tapped.pop()
        factors = torch.cat([batch.factors() for batch in self._opened])
        found = len(next(iter(blocks.values())))
        if found != len(factors):
            raise InputError(
                f"the forward passes had {found} rows, and `loss` was told of {len(factors)}: call `loss` "
                "once for each forward pass with gradients"
            )
        if self._check is not None:
            passed = self._check.passed(blocks)
            self._check = None if passed else SelfCheck.begin(self.tapped, self.stages.inside)
        inverse = torch.where(factors != 0, 1 / factors, 0)
        blocks = {name: G * inverse.to(G).view(-1, *[1] * (G.ndim - 1)) for name, G in blocks.items()}
        finite = torch.stack([G.flatten(1).isfinite().all(1) for G in blocks.values()]).all(0)
        blocks = {
            name: torch.where(finite.view(-1, *[1] * (G.ndim - 1)), G, torch.zeros_like(G))
            for name, G in blocks.items()
        }
        if not self.stages.late:
            blocks = self._finished(blocks)
        beside = joined([self._beside(batch, self._microstep + n) for n, batch in enumerate(self._opened)])
        self._made.append((blocks, {**beside, "visits/skipped": ~finite.cpu().numpy()}))
        self._microstep += len(self._opened)
        self._opened = []

    def step(self, *, epoch: int = 0, factor: float = 1.0, skipped: bool = False) -> None:
        """Record the step, at its end.

        Args:
            epoch: its number, from 0.
            factor: what clipping multiplied the gradient by.
            skipped: whether a loss scaler left the step out: its rows are marked, and their gradients are 0.

        Raises:
            InputError: nothing was told of the step; float16 does not hold a gradient.
            StorageError: the disk is full or failed; what was recorded is kept.
        """
        self.substep()
        if not self._made:
            raise InputError(
                "the step has no rows: tell the losses of its batches with `loss`, before backward"
            )
        if self.stages.scale is not None and self.stages.late:
            self._scaled = self.stages.scale.read()
            self._made = [(self._finished(self.stages.scale(G)), beside) for G, beside in self._made]
        visits = joined([{**self._arrays(G, beside, skipped), **beside} for G, beside in self._made])
        count = len(visits["visits/row"])
        of_all = {"epoch": epoch, "step": self.number, "factor": float(factor), "scaled": self._scaled}
        columns = {f"visits/{name}": np.full(count, value) for name, value in of_all.items()}
        lost = np.asarray(visits["visits/skipped"]) | skipped
        self._made, self._microstep, self.number = [], 0, self.number + 1
        self.log.add({**visits, **columns, "visits/skipped": lost})

    def flush(self) -> None:
        """Bring the rows so far to the disk, before a checkpoint from which training may resume."""
        self.log.flush()

    def _finished(self, blocks: Blocks) -> Blocks:
        done = self.stages.after(blocks)
        if not isinstance(done, dict):
            raise InputError("a store holds gradients: the transform must not end in scores")
        return {name: G.cpu() for name, G in done.items()}

    def _beside(self, batch: _Batch, microstep: int) -> dict[str, Values]:
        names, lengths = self.names.of(batch.rows)
        count = len(batch.rows)
        return {
            "rows/id": storable(batch.names if batch.names is not None else names),
            "rows/text": self.names.texts(batch.rows),
            "rows/length": lengths if batch.lengths is None else batch.lengths,
            "rows/loss": batch.losses.double().cpu().numpy(),
            "visits/row": batch.rows,
            "visits/microstep": np.full(count, microstep, np.int64),
        }

    def _arrays(self, blocks: Blocks, beside: Mapping[str, Values], skipped: bool) -> dict[str, Values]:
        """The gradients of rows as the store holds them, and which of them are zero."""
        stored = {}
        for name, G in blocks.items():
            G = torch.zeros_like(G) if skipped else G
            cast = G.to(self.dtype)
            if not bool(cast.isfinite().all()):
                row = int((~cast.isfinite()).flatten(1).any(1).nonzero()[0])
                raise InputError(
                    f"the gradient of row {beside['rows/id'][row]} in {name} at step {self.number} is too "
                    f"large for {str(self.dtype).removeprefix('torch.')}: record with dtype=torch.float32"
                )
            stored[GRADIENTS + name] = cast.numpy()
        zero = [(array == 0).reshape(len(array), -1).all(1) for array in stored.values()]
        return {**stored, "rows/zero": np.logical_and.reduce(zero)}


@dataclass(eq=False)
class _Names:
    """Names, texts and lengths of rows, by their numbers."""

    data: Data | None
    _lengths: np.ndarray | None = None

    def of(self, rows: np.ndarray) -> tuple[list[str], np.ndarray]:
        """The names of rows, and their lengths (1 where there are no data).

        Raises:
            InputError: a number that the data has not.
        """
        if self.data is None:
            return [str(row) for row in rows], np.ones(len(rows), np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self.data):
            raise InputError(
                f"row {rows.max() if rows.max() >= len(self.data) else rows.min()} is none of the "
                f"{len(self.data)} rows of the data: give the rows that are trained on as `data`"
            )
        if self._lengths is None:
            self._lengths = lengths_of(self.data).astype(np.int64)
        ids = getattr(self.data, "ids", None)
        return [str(ids[row]) if ids else str(row) for row in rows], self._lengths[rows]

    def texts(self, rows: np.ndarray) -> list[str]:
        """The texts of rows, where the data has them."""
        texts = getattr(self.data, "texts", None)
        return storable(texts[row] if texts else "" for row in rows)


# --- the run


def trained_model(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and a PEFT model, whose modules have the names of `build`.

    Raises:
        InputError: a model that is compiled, or whose parameters are sharded.
    """
    compiled = any(getattr(one, "_compiled_call_impl", None) is not None for one in model.modules())
    if hasattr(model, "_orig_mod") or compiled:
        raise InputError(
            "the model is compiled, and rows are seen in the calls of its modules: train it without "
            "torch.compile to record rows"
        )
    if isinstance(model, DistributedDataParallel):
        return trained_model(model.module)
    sharded = next((name for name, p in model.named_parameters() if hasattr(p, "placements")), None)
    if sharded is not None or "FullyShardedDataParallel" in type(model).__name__:
        raise InputError(
            "the parameters of the model are sharded over processes: train with DistributedDataParallel to "
            "record rows"
        )
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    return inner  # pyright: ignore[reportReturnType]


def _own_run(run: str | Path) -> Path:
    """The run directory of this process."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Path(run)
    return shard_run(run, Shard(dist.get_rank() + 1, dist.get_world_size()))


def _describe(
    model: nn.Module, data: Data | None, transform: Transform, options: RecordOptions
) -> Provenance:
    """What the rows depend on."""
    made = describe_model(model, data, options.get("view") or View(), transform)
    recorded = {"normalize": options.get("normalize", "none")}
    return made.merged({RECORDED: recorded}).merged(options.get("settings"))


def _as_begun(folder: Path, made: Provenance) -> Provenance:
    """The same with the model as it was when the training began, which the run says."""
    segments = segments_of(folder, "store")
    if not segments:
        return made
    return replace(made, model=Provenance.of(read_header(segments[0]).settings).model)
