"""Run directories: per-example gradients, mean gradients and scores on disk, and what they were made with."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import numpy as np
import torch
from torch import Tensor, nn

import gradfn
from gradfn.data import offsets_of
from gradfn.engine.engine import Engine, probe_engine
from gradfn.engine.stream import Progress, lengths_of
from gradfn.errors import InputError
from gradfn.methods.attribution import Attribution, Queries, Scorer
from gradfn.methods.inner_product import EngineScorer, InnerProduct
from gradfn.model.fingerprint import model_fingerprint
from gradfn.model.layers import Linear
from gradfn.model.losses import CausalLMLoss, ModelLoss
from gradfn.model.sites import View, find_sites, uncovered
from gradfn.runs.shards import Shard, shard_rows, shard_run
from gradfn.statistics.fold import sums_of
from gradfn.statistics.moments import mean, total
from gradfn.store import Overwrite, Store, differing, open_part, open_store, open_writer
from gradfn.subject import Subject, SubjectOptions, subject_of
from gradfn.transforms import Transform, UnitNormalize, chain, unit_normalize
from gradfn.transforms.projection import Loaders, lenient, parse_projection
from gradfn.types import Blocks, Data, LossFn, Rows

Settings = Mapping[str, Any]
Aggregation = Literal["mean", "sum"]
GRADIENTS = "gradients/"
SHARES = "scores_by/"
SEGMENT_BATCHES = 64
SEGMENT_BYTES = 256 << 20
READ_BYTES = 256 << 20
TEXT_CHARACTERS = 4096
"""Characters kept of a row's text, which is there to be recognised; strings in a store have one width."""


@dataclass(frozen=True)
class Summary:
    """What a run holds and what was noticed on the way.

    Args:
        path: the index file.
        rows: how many rows it holds (of a shard: its own); tokens, where the view is by token.
        unsupervised: rows with nothing to supervise; their gradient is zero.
        zero: rows whose result is zero altogether (the unsupervised ones among them).
        resumed: rows that were there already.
        unprobed: the layers that no probe could see, which went through `vmap(grad)`.
    """

    path: Path
    rows: int
    unsupervised: int
    zero: int
    resumed: int
    unprobed: tuple[str, ...] = ()


def unprobed(engine: Engine) -> tuple[str, ...]:
    """The layers of an engine that go through `vmap(grad)`; known for certain after its first batch."""
    return tuple(dict.fromkeys(site.path or "root" for site in engine.sites if not site.probed))


def describe(subject: Subject, data: Data, transform: Transform | None) -> dict[str, Any]:
    """What the rows of a run depend on, as plain values: model, data, loss, layers and transform."""
    fingerprint = getattr(data, "fingerprint", None)
    return {
        "gradfn": gradfn.__version__,
        "model": {"fingerprint": model_fingerprint(subject.model)},
        "data": {"fingerprint": fingerprint() if callable(fingerprint) else None, "rows": len(data)},
        "loss": loss_settings(subject.loss),
        "layers": subject.view.settings(),
        "transform": chain(transform or chain()).settings(),
    }


def loss_settings(loss: LossFn | None) -> dict[str, Any]:
    """What a run records of a loss; None is next-token cross-entropy.

    >>> def square(params, example): ...
    >>> loss_settings(square)
    {'name': 'square'}
    """
    if loss is not None and not isinstance(loss, CausalLMLoss | ModelLoss):
        reduction = {"reduction": loss.reduction} if hasattr(loss, "reduction") else {}  # pyright: ignore
        return {"name": getattr(loss, "__qualname__", type(loss).__name__), **reduction}
    reference = getattr(loss, "reference", None)
    return {
        "name": loss.task if isinstance(loss, ModelLoss) else "causal_lm",
        "reduction": "mean" if loss is None else loss.reduction,
        "criterion": "cross_entropy" if loss is None else loss.criterion,
        "label_smoothing": 0.0 if loss is None else loss.label_smoothing,
        "reference": None if reference is None else {"fingerprint": model_fingerprint(reference)},
    }


def merged(settings: dict[str, Any], more: Settings | None) -> dict[str, Any]:
    """Settings with further ones laid over them, group by group.

    >>> merged({"model": {"fingerprint": "ab"}}, {"model": {"path": "gpt2"}})
    {'model': {'fingerprint': 'ab', 'path': 'gpt2'}}
    """
    result = dict(settings)
    for key, value in (more or {}).items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = {**result[key], **value} if both else value
    return result


def transform_of(
    settings: Settings, normalize: Transform | None = None, loaders: Loaders | None = None
) -> Transform:
    """Make the transform again from the settings that a store recorded.

    Args:
        normalize: the optimizer's normalisation that the settings tell by a digest.
        loaders: of projections that are read from runs, see `parse_projection`.

    Raises:
        InputError: the chain has a stage that holds tensors, which a store records by digest only.

    >>> transform_of({"transform": chain(unit_normalize()).settings()}).stages[0]
    UnitNormalize()
    """
    stages = []
    for stage in settings["transform"]["chain"]:
        fields = {key: value for key, value in stage.items() if key != "transform"}
        match stage["transform"]:
            case "Project" | "Compress" | "Joint":
                stages.extend(lenient(parse_projection(fields["projection"], fields.get("seed", 0))).stages)
            case "Principal" | "Selected" if loaders is not None:
                (stage_again,) = parse_projection(fields["projection"], 0, loaders).stages
                if stage_again.settings() != stage:
                    raise InputError(f"{fields['projection']} is another one by now: make the store again")
                stages.append(stage_again)
            case "UnitNormalize":
                stages.append(unit_normalize())
            case "Adam" | "Adafactor" if normalize is not None:
                stages.append(normalize)
            case name:
                raise InputError(f"{name} cannot be made from a store's settings: give its transform again")
    return chain(*stages)


def plan_slices(
    lengths: np.ndarray, token_batch_size: int, row_bytes: int | np.ndarray
) -> list[tuple[int, int]]:
    """Cut rows into the slices of segments: at most 64 batches of tokens and 256 MiB each.

    >>> plan_slices(np.array([4, 4, 4]), token_batch_size=1, row_bytes=200 << 20)
    [(0, 1), (1, 2), (2, 3)]
    """
    sizes = np.broadcast_to(row_bytes, len(lengths))
    slices, start, tokens, held = [], 0, 0, 0
    for row, (length, size) in enumerate(zip(lengths.tolist(), sizes.tolist(), strict=True)):
        full = held + size > SEGMENT_BYTES or tokens + length > SEGMENT_BATCHES * token_batch_size
        if row > start and full:
            slices.append((start, row))
            start, tokens, held = row, 0, 0
        tokens, held = tokens + length, held + size
    return [*slices, (start, len(lengths))]


def _row_bytes(scorer: Scorer) -> int:
    if not isinstance(scorer, EngineScorer):
        return 0  # scores that no engine makes are few numbers a row
    plans = scorer.engine.lowered().plans.values()
    return sum(int(np.prod(plan.shape)) * plan.dtype.itemsize for plan in plans)


def _zero_rows(values: Blocks | Tensor) -> Tensor:
    parts = values.values() if isinstance(values, dict) else [values]
    return torch.stack([(part.flatten(1) == 0).all(1) for part in parts]).all(0)


def storable(texts: Sequence[str]) -> list[str]:
    """Texts as a store holds them: their first 4096 characters, without the NULs that HDF5 would end in.

    >>> storable(["a\\0b\\0", "c" * 5000])[0], len(storable(["c" * 5000])[0])
    ('a\\x00b', 4096)
    """
    return [text[:TEXT_CHARACTERS].rstrip("\0") for text in texts]


def _ids_of(data: Data, rows: range) -> list[str]:
    """The names of rows as a store holds them; their numbers, where they have none."""
    ids = getattr(data, "ids", None)
    return storable([str(ids[row]) if ids else str(row) for row in rows])


def _row_arrays(data: Data, rows: range, result: Rows) -> dict[str, np.ndarray | list[str]]:
    """What lies beside the gradients or scores of every row."""
    texts = getattr(data, "texts", None)
    return {
        "rows/id": _ids_of(data, rows),
        "rows/text": storable([texts[row] if texts else "" for row in rows]),
        "rows/length": lengths_of(data)[rows.start : rows.stop].astype(np.int64),
        "rows/loss": result.losses.double().numpy(),
        "rows/zero": _zero_rows(result.values).numpy(),
    }


def _token_arrays(data: Data, rows: range, result: Rows) -> dict[str, np.ndarray | list[str]]:
    """What lies beside the gradients or scores of every token: its row of the data, its place, its id."""
    lengths = lengths_of(data)[rows.start : rows.stop]
    return {
        "rows/document": np.repeat(np.arange(rows.start, rows.stop), lengths),
        "rows/position": np.concatenate([np.arange(length) for length in lengths]),
        "rows/token": np.concatenate([data[row]["input_ids"].numpy() for row in rows]).astype(np.int32),
        "rows/zero": _zero_rows(result.values).numpy(),
    }


def _token_facts(data: Data, bounds: np.ndarray) -> dict[str, Any]:
    """What a store of tokens keeps of its documents: where their tokens start, and their names."""
    return {"tokens/offsets": bounds, "documents/id": _ids_of(data, range(len(data)))}


def _kept(data: Data, bounds: np.ndarray, tokens: bool, fixed: Mapping[str, Any] | None) -> dict[str, Any]:
    """What lies in the index beside the rows, as a store holds it."""
    every = {**(fixed or {}), **(_token_facts(data, bounds) if tokens else {})}
    return {name: storable(value) if isinstance(value, list) else value for name, value in every.items()}


def _names(data: Data, tokens: bool, kept: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of rows and queries, which are in no fingerprint, for `open_writer` to compare."""
    names = {name: list(value) for name, value in kept.items() if name.endswith("/id")}
    return names if tokens else {**names, "rows/id": _ids_of(data, range(len(data)))}


def _write_run(
    run: str | Path,
    kind: str,
    scorer: Scorer,
    subject: Subject,
    data: Data,
    settings: Settings,
    arrays: Callable[[Blocks | Tensor], dict[str, np.ndarray]],
    *,
    overwrite: Overwrite,
    progress: Progress | None,
    shard: Shard | None,
    fixed: Mapping[str, Any] | None = None,
) -> Summary:
    """Make the rows that are missing, a segment at a time, and join the segments.

    By token, a segment holds the tokens of whole documents.
    """
    tokens, lengths = subject.view.tokens, lengths_of(data)
    bounds = offsets_of(lengths if tokens else np.ones(len(data), np.int64))
    own, part = _own_rows(lengths, bounds, shard)
    beside = _token_arrays if tokens else _row_arrays
    kept = _kept(data, bounds, tokens, fixed)
    row_bytes = _row_bytes(scorer) * np.diff(bounds)[own.start : own.stop]
    plan = plan_slices(lengths[own.start : own.stop], subject.token_batch_size, row_bytes)
    edges = [(int(bounds[own.start + a]), int(bounds[own.start + b])) for a, b in plan]
    slices = [(start, stop) for start, stop in edges if start < stop]
    target, total = shard_run(run, shard), int(bounds[own.stop] - bounds[own.start])
    names = _names(data, tokens, kept)
    with open_writer(target, kind, settings, int(bounds[-1]), overwrite, part=part, names=names) as writer:
        missing = [_between(bounds, *span) for span in writer.missing(slices)]
        todo = sum(int(lengths[rows.start : rows.stop].sum()) for rows in missing)
        resumed = total - sum(int(bounds[rows.stop] - bounds[rows.start]) for rows in missing)
        if progress:
            progress(int(lengths[own.start : own.stop].sum()) - todo)
        for rows in missing:
            result = scorer(data, rows, progress=progress)
            start, stop = int(bounds[rows.start]), int(bounds[rows.stop])
            writer.write(start, stop, {**arrays(result.values), **beside(data, rows, result)})
        path = writer.finish(kept)
    with open_part(target, kind) as store:
        zero = int(store.read("rows/zero", *store.span).sum())
    layers = unprobed(scorer.engine) if isinstance(scorer, EngineScorer) else ()
    return Summary(path, total, _unsupervised(data, own), zero, resumed, layers)


def _own_rows(lengths: np.ndarray, bounds: np.ndarray, shard: Shard | None) -> tuple[range, Any]:
    """The documents to do, and of a shard the rows of the file that they are (tokens, by token)."""
    if shard is None:
        return range(len(lengths)), None
    own = shard_rows(lengths, shard)
    part = int(bounds[own.start]), int(bounds[own.stop])
    if part[0] == part[1]:
        raise InputError(f"the rows of shard {shard} have no tokens: choose fewer shards")
    return own, part


def _between(bounds: np.ndarray, start: int, stop: int) -> range:
    """The documents whose tokens (or rows) are `start` to `stop`; empty ones at the borders left out.

    >>> _between(np.array([0, 0, 2, 2, 5]), 0, 2)
    range(1, 2)
    """
    return range(int(np.searchsorted(bounds, start, "right")) - 1, int(np.searchsorted(bounds, stop)))


def _unsupervised(data: Data, rows: range) -> int:
    supervised = getattr(data, "supervised", None)
    return 0 if supervised is None else int((supervised[rows.start : rows.stop] == 0).sum())


def _gradient_arrays(values: Blocks | Tensor) -> dict[str, np.ndarray]:
    if not isinstance(values, dict):
        raise TypeError("a store holds gradients: the transform must not end in scores")
    return {GRADIENTS + name: value.numpy() for name, value in values.items()}


def build(
    run: str | Path,
    model: nn.Module | Subject,
    data: Data,
    transform: Transform | None = None,
    *,
    settings: Settings | None = None,
    overwrite: Overwrite = False,
    shard: Shard | None = None,
    progress: Progress | None = None,
    **options: Unpack[SubjectOptions],
) -> Summary:
    """Write the transformed gradient of every row to `RUN/store.h5`; a killed run resumes where it was.

    By token (`View(tokens=True)`), the rows of the file are tokens: `rows/document` and `rows/position` say
    which, and `tokens/offsets` where each document's start.

    Args:
        run: the run directory.
        model, data, transform, progress, options: see `collect`.
        settings: recorded beside what is known of the model, data and transform (paths, say).
        overwrite: replace what is there; "unlike": only where it was made otherwise.
        shard: do this part of the rows only, for `merge_run` to join.

    Raises:
        InputError: the directory holds a store made otherwise; a loss is not finite; more shards than rows.
        StorageError: the disk is full; what is complete is kept.
    """
    subject, transform = subject_of(model, **options), transform or chain()
    known = describe(subject, data, transform)
    engine = probe_engine(subject.model, subject.loss, transform, view=subject.view)
    scorer = EngineScorer(engine, subject.token_batch_size)
    return _write_run(
        run, "store", scorer, subject, data, merged(known, settings), _gradient_arrays, shard=shard,
        overwrite=overwrite, progress=progress,
    )  # fmt: skip


def reduce(
    run: str | Path,
    model: nn.Module | Subject,
    data: Data,
    transform: Transform | None = None,
    *,
    aggregation: Aggregation = "mean",
    settings: Settings | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Unpack[SubjectOptions],
) -> Summary:
    """Write the mean or sum of the rows' transformed gradients to `RUN/store.h5`, a store of one row.

    Args:
        aggregation: "mean" or "sum" over rows, of the transformed gradients.
        run, model, data, transform, settings, overwrite, progress, options: see `build`.

    Raises:
        InputError: the directory holds a store made otherwise; no rows; a view by token; a loss not finite.
    """
    if aggregation not in get_args(Aggregation):
        raise InputError(f"no aggregation {aggregation!r}: choose {' or '.join(get_args(Aggregation))}")
    subject = subject_of(model, **options)
    if subject.view.tokens:
        raise InputError("gradients are reduced by example or by head, not by token: use build for tokens")
    transform, size = transform or chain(), subject.token_batch_size
    known = describe(subject, data, transform)
    known = merged({**known, "aggregation": aggregation}, settings)
    fold = mean() if aggregation == "mean" else total()
    summed = chain(transform, fold.stage())
    engine = probe_engine(subject.model, subject.loss, summed, view=subject.view)
    with open_writer(run, "store", known, 1, overwrite) as writer:
        if not writer.complete:
            sums, losses = sums_of(fold, engine, data, token_batch_size=size, progress=progress)
            blocks = fold.finalize(sums)
            count = len(data) if aggregation == "mean" else 1
            beside = Rows(blocks, torch.tensor([losses / count], dtype=torch.float64))
            row = {"rows/id": [aggregation], "rows/text": [f"{aggregation} of {len(data)} rows"],
                   "rows/length": np.array([int(lengths_of(data).sum())]), "rows/loss": beside.losses.numpy(),
                   "rows/zero": _zero_rows(blocks).numpy()}  # fmt: skip
            if writer.missing([(0, 1)]):
                writer.write(0, 1, {**_gradient_arrays(blocks), **row})
        path = writer.finish()
    unsupervised = _unsupervised(data, range(len(data)))
    return Summary(path, 1, unsupervised, unsupervised, 0, unprobed(engine))


def score_run(
    run: str | Path,
    model: nn.Module | Subject,
    train: Data,
    queries: Queries,
    method: Attribution,
    *,
    by_block: bool = False,
    settings: Settings | None = None,
    fixed: Mapping[str, Any] | None = None,
    overwrite: Overwrite = False,
    shard: Shard | None = None,
    progress: Progress | None = None,
    **options: Unpack[SubjectOptions],
) -> Summary:
    """Write the scores of every row against queries to `RUN/scores.h5`, `/scores [rows, queries]` float32.

    Args:
        queries: query examples, or their gradients after the method's `query_transform`,
            `{block: [queries, ...]}`; None for the rows' self-influence.
        method: see `score`; for several dampings the queries of one come after those of the other.
        by_block: write each block's share of the scores too, `/scores_by/<block>`.
        fixed: arrays about the queries, kept in the index.
        run, model, train, settings, overwrite, shard, progress, options: see `build`.
    """
    subject = subject_of(model, **options)
    transform = method.row_transform if isinstance(method, InnerProduct) else None
    known = {**describe(subject, train, transform), "by_block": by_block, "method": method.settings()}
    scorer = method.scorer(subject, queries, by_block=by_block)
    return _write_run(
        run, "scores", scorer, subject, train, merged(known, settings), _score_arrays, shard=shard,
        overwrite=overwrite, progress=progress, fixed=fixed,
    )  # fmt: skip


def write_scores(
    run: str | Path,
    train: Data,
    result: Rows,
    *,
    settings: Settings,
    fixed: Mapping[str, Any] | None = None,
    tokens: bool = False,
    overwrite: Overwrite = False,
    shard: Shard | None = None,
) -> Path:
    """Write scores at hand to `RUN/scores.h5`, with what lies beside the rows.

    Args:
        result: scores `[rows, queries]` and the rows' losses; of a shard, of its rows.
        tokens: whether a row of the scores is a token.
        run, train, settings, fixed, overwrite, shard: see `score_run`.
    """
    beside, lengths = (_token_arrays if tokens else _row_arrays), lengths_of(train)
    bounds = offsets_of(lengths if tokens else np.ones(len(train), np.int64))
    own, part = _own_rows(lengths, bounds, shard)
    first, last = part or (0, int(bounds[-1]))
    kept = _kept(train, bounds, tokens, fixed)
    with open_writer(
        shard_run(run, shard), "scores", settings, int(bounds[-1]), overwrite, part=part,
        names=_names(train, tokens, kept),
    ) as writer:  # fmt: skip
        rows = {**_score_arrays(result.values), **beside(train, own, result)}
        for start, stop in writer.missing([(first, last)]):
            these = {name: values[start - first : stop - first] for name, values in rows.items()}
            writer.write(start, stop, these)
        return writer.finish(kept)


def _score_arrays(values: Blocks | Tensor) -> dict[str, np.ndarray]:
    """Scores, and where they came by block the shares that they are the sum of."""
    if not isinstance(values, dict):
        return {"scores": values.float().numpy()}
    total = sum(values.values(), torch.zeros(()))
    return {"scores": total.float().numpy(),
            **{SHARES + name: share.float().numpy() for name, share in values.items()}}  # fmt: skip


LAST = ("Precondition", "UnitNormalize")
"""What may come last in a chain, in this order."""


def tail_of(settings: Settings) -> list[dict[str, Any]]:
    """The curvature and the unit norm at the end of a transform's settings."""
    stages, tail = list(settings["transform"]["chain"]), []
    for name in reversed(LAST):
        if stages and stages[-1]["transform"] == name:
            tail.insert(0, stages.pop())
    return tail


def base_of(settings: Settings) -> dict[str, Any]:
    """Settings of a transform, what `tail_of` gives left out: it can be added to stored rows later."""
    stages = settings["transform"]["chain"]
    return {"chain": stages[: len(stages) - len(tail_of(settings))]}


def refuse_mismatch(stored: Settings, wanted: Settings, what: str) -> None:
    """Refuse to compare gradients that were made differently.

    Compared: the model, the layers and the transform, and, where both record one, the tokenizer, the image
    processor and what tokens are masked by. A curvature and a final unit norm may be added to what is stored;
    a unit norm cannot be taken away.

    Raises:
        InputError: naming what differs, with both values.
    """
    differences = differing(_compared(stored, wanted), _compared(wanted, stored))
    if differences:
        shown = ", ".join(f"{key} is {a} there and {b} here" for key, (a, b) in differences.items())
        raise InputError(
            f"{what} was made differently, so its gradients cannot be compared ({shown}): "
            "use the same model and options, or make it again"
        )
    if _ends_in_unit_norm(stored) and not _ends_in_unit_norm(wanted):
        raise InputError(
            f"{what} was made with unit norm, which cannot be undone: add --unit-normalize (cosine), or make "
            "it again without"
        )


def _compared(settings: Settings, other: Settings) -> dict[str, Any]:
    """What must agree; where the models' weights differ, with where they come from, to tell them apart."""
    model, theirs = settings["model"], other["model"]
    same = model["fingerprint"] == theirs["fingerprint"]
    compared = {
        "model": model["fingerprint"] if same else _model_in_words(model),
        "layers": settings["layers"],
        "transform": _without_paths(base_of(settings)),
    }
    for key in ("tokenizer", "processor"):
        prints = [side.get(key, {}).get("fingerprint") for side in (settings, other)]
        compared |= {} if None in prints else {key: prints[0]}
    both = "masking" in settings and "masking" in other
    return {**compared, "masking": settings["masking"]} if both else compared


def _without_paths(transform: dict[str, Any]) -> dict[str, Any]:
    """The same without where fitted projections lie, which their digests tell."""
    stages = []
    for stage in transform["chain"]:
        kept = {"Principal": 2, "Selected": 1}.get(stage["transform"])
        words = str(stage.get("projection")).split(":")
        stages.append(stage if kept is None else {**stage, "projection": ":".join(words[:kept])})
    return {"chain": stages}


def _model_in_words(model: Settings) -> str:
    made = ", ".join(str(model[key]) for key in ("path", "precision") if key in model)
    return f"{made} (fingerprint {model['fingerprint']})" if made else model["fingerprint"]


def _ends_in_unit_norm(settings: Settings) -> bool:
    stages = settings["transform"]["chain"]
    return bool(stages) and stages[-1]["transform"] == "UnitNormalize"


def open_gradients(run: str | Path) -> Store:
    """Open a store of gradients, `open_store` for what `build` and `reduce` write.

    Raises:
        InputError: also where the file holds something else.
    """
    store = open_store(run)
    if not store.names(GRADIENTS) or "transform" not in store.settings:
        raise InputError(
            f"{store.path} holds {store.header.kind}, not gradients and how they were made: "
            "give a store that build or reduce wrote"
        )
    return store


def read_gradients(store: Store, start: int = 0, stop: int | None = None) -> Blocks:
    """Read rows of a store as blocks."""
    arrays = store.read_all(store.names(GRADIENTS), start, stop)
    return {name.removeprefix(GRADIENTS): torch.from_numpy(array) for name, array in arrays.items()}


def stored_scores(store: Store, scorer: Transform, *, rows_per_chunk: int | None = None) -> Iterator[Tensor]:
    """Stream the scores of a store's rows against queries, chunk by chunk in row order: `[chunk, queries]`.

    Args:
        store: what `build` wrote.
        scorer: from stored rows to scores, a method's `scorer`.
        rows_per_chunk: rows in memory at a time; None: as many as 256 MiB hold.
    """
    names = store.names(GRADIENTS)
    row_bytes = sum(4 * int(np.prod(store.shape(name)[1:])) for name in names)
    for _, _, arrays in store.chunks(names, rows_per_chunk or max(1, READ_BYTES // row_bytes)):
        rows = {name.removeprefix(GRADIENTS): torch.from_numpy(a) for name, a in arrays.items()}
        yield scorer(rows)  # pyright: ignore[reportReturnType]


def stored_shares(store: Store, row: int, scorer: Transform) -> Blocks:
    """Each block's share of a stored row's scores, `{block: [queries]}`; they sum to `stored_scores`."""
    shares: Any = scorer(read_gradients(store, row, row + 1))
    return {name: share[0] for name, share in shares.items()}


def ends_in_unit_norm(transform: Transform) -> bool:
    """Whether a chain's last stage is the unit norm.

    >>> ends_in_unit_norm(chain(unit_normalize()))
    True
    """
    stages = chain(transform).stages
    return bool(stages) and isinstance(stages[-1], UnitNormalize)


def layer_summary(model: nn.Module, view: View | None = None) -> str:
    """One line on what is attributed and what is not, in layers and parameters."""
    sites = find_sites(model, view)
    everything = sum(p.numel() for p in model.parameters())
    share = 1 - sum(uncovered(model, sites).values()) / everything
    count = len({site.path for site in sites})
    kind = "linear layer" if all(isinstance(site.layer, Linear) for site in sites) else "layer"
    return f"{count} {kind}{'' if count == 1 else 's'}, {share:.0%} of {everything:,} parameters"
