"""What every command is asked: a request each. Its docstring is the command's help."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from gradfn.cli.evaluations import (
    ALONE,
    BrittlenessRequest,
    ChangeRequest,
    LdsRequest,
    LooRequest,
    MislabelRequest,
    OverlapRequest,
    RecallRequest,
)
from gradfn.cli.options import (
    COMPONENTS,
    PLAIN_QUERY,
    PROJECTION,
    QUERY_BY,
    STORED_BY,
    STORED_MODEL,
    UNWEIGHTED,
    Criterion,
    CurvatureOptions,
    DataOptions,
    FitOptions,
    GradientOptions,
    Kind,
    LayerOptions,
    LossOptions,
    MethodOptions,
    ModelOptions,
    QueryOptions,
    RunOptions,
    SolverOptions,
    TableOptions,
)
from gradfn.cli.request import OUTPUT, Request, argument, command_line, found, group, option
from gradfn.cli.results import ReportRequest, SelectRequest
from gradfn.cli.searching import SearchOptions
from gradfn.cli.subsets import SubsetOptions
from gradfn.cli.training import RecordingOptions, TrainingOptions, TrainOptions
from gradfn.cli.values import dims, found_projection, paths

_MADE = "The run directory to write; made if absent, resumed if it was made by the same command."
TUNED = "Of grad_dot, grad_cosine, logra, kfac, ekfac, relatif, trackstar, trak, datainf: those to try."
_SEED = "Key of the projection, and what masked-lm masks."


def run(help: str = _MADE, **how: Any) -> Any:
    """The run directory that a command writes."""
    return argument(help, file=os.path.abspath, **how)


@dataclass(frozen=True, kw_only=True)
class ModelRequest(Request):
    """What every command is asked that loads a model and rows."""

    model: ModelOptions = group(ModelOptions)
    data: DataOptions = group(DataOptions)
    loss: LossOptions = group(LossOptions)
    layers: LayerOptions = group(LayerOptions, by=None)
    seed: int = option(0, _SEED, panel="Gradients")

    @property
    def query_loss(self) -> Criterion | None:
        """The loss of queries, where it is another than the rows'."""
        query = getattr(self, "query", None)
        return query.query_loss if isinstance(query, QueryOptions) else None

    @property
    def new_weights(self) -> int | None:
        """The seed of the weights that a model gets instead of its own; None: it keeps them."""
        return None


@dataclass(frozen=True, kw_only=True)
class ScoreRequest(ModelRequest):
    """Show which training rows made the model do this.

    For each query, its proponents and opponents. A positive score is a proponent: a training step on that row
    lowers the query's loss. Without arguments: the example inside the package, a tiny language model and the
    corpus that it learned.
    """

    COMMAND: ClassVar[str] = "score"
    WRITES: ClassVar[str] = "scores"
    FIRST: ClassVar[tuple[str, ...]] = ("model", "dataset", "query", "method", "projection_dim", "top")
    run: str | None = run("The run directory to write scores.h5 to; none: only show them.", default=None)
    layers: LayerOptions = group(LayerOptions)
    query: QueryOptions = group(QueryOptions)
    method: MethodOptions = group(MethodOptions)
    gradients: GradientOptions = group(GradientOptions)
    curvature: CurvatureOptions = group(CurvatureOptions)
    fit: FitOptions = group(FitOptions)
    solver: SolverOptions = group(SolverOptions)
    table: TableOptions = group(TableOptions)
    output: RunOptions = group(RunOptions)


_OTHERWISE: Any = option(
    None, PROJECTION, shown="the curvature's, or else rademacher:16x16", file=found_projection
)


@dataclass(frozen=True, kw_only=True)
class GradientsRequest(ModelRequest):
    """What commands are asked that write gradients."""

    FIRST: ClassVar[tuple[str, ...]] = ("model", "dataset", "projection_dim", "hessian_path")
    run: str = run()
    layers: LayerOptions = group(LayerOptions, by=STORED_BY)
    gradients: GradientOptions = group(GradientOptions, projection=_OTHERWISE)
    curvature: CurvatureOptions = group(CurvatureOptions)
    output: RunOptions = group(RunOptions)


@dataclass(frozen=True, kw_only=True)
class BuildRequest(GradientsRequest):
    """Write a store of per-example gradients.

    `gradfn query` searches it; `gradfn score --query-path` takes it as queries.
    """

    COMMAND: ClassVar[str] = "build"
    WRITES: ClassVar[str] = "store"


@dataclass(frozen=True, kw_only=True)
class ReduceRequest(GradientsRequest):
    """Write the mean or sum of a query set's gradients.

    `gradfn score --query-path` and `gradfn query --query-path` take it as one query.
    """

    COMMAND: ClassVar[str] = "reduce"
    WRITES: ClassVar[str] = "store"
    aggregation: Literal["mean", "sum"] = option("mean", "Of the rows' gradients.", panel="Gradients")
    output: RunOptions = group(RunOptions, **ALONE)


_STATE: Any = option(
    None, "Of rows that an optimizer scaled: the state to scale queries by.", shown="the store's", file=found
)


@dataclass(frozen=True, kw_only=True)
class QueryRequest(Request):
    """Search a store that `gradfn build` wrote.

    The search is exact, or by an index of FAISS. Model, layers, loss and transform are the store's. Without a
    query, on a terminal, queries are asked for one after the other.
    """

    COMMAND: ClassVar[str] = "query"
    FIRST: ClassVar[tuple[str, ...]] = ("query", "completion", "by", "top")
    store: str = argument("A run directory, or the store.h5 in it.", file=found)
    query: QueryOptions = group(QueryOptions, **PLAIN_QUERY)
    model: ModelOptions = group(ModelOptions, **STORED_MODEL)
    data: DataOptions = group(
        DataOptions, dataset=None, dataset_revision=None, split=None, chunk_length=None, **UNWEIGHTED
    )
    curvature: CurvatureOptions = group(CurvatureOptions)
    gradients: GradientOptions = group(
        GradientOptions, optimizer_state=_STATE, projection=None, projection_dim=None
    )
    loss: LossOptions = group(LossOptions, criterion=None, label_smoothing=None, reduction=None)
    layers: LayerOptions = group(LayerOptions, include=None, exclude=None, no_biases=None, by=QUERY_BY)
    search: SearchOptions = group(SearchOptions)
    table: TableOptions = group(TableOptions)
    output: RunOptions = group(RunOptions, **ALONE)


@dataclass(frozen=True, kw_only=True)
class HessianRequest(ModelRequest):
    """Fit a curvature over a dataset's gradients.

    `gradfn score`, `query`, `reduce` and `build` take it as --hessian-path.
    """

    COMMAND: ClassVar[str] = "hessian"
    WRITES: ClassVar[str] = "hessian"
    FIRST: ClassVar[tuple[str, ...]] = ("model", "dataset", "method", "projection_dim")
    run: str = run()
    kind: Kind = option("second_moment", "What to fit.", name="method", panel="Curvature")
    gradients: GradientOptions = group(GradientOptions, unit_normalize=None)
    fit: FitOptions = group(FitOptions, components=None)
    output: RunOptions = group(RunOptions)


@dataclass(frozen=True, kw_only=True)
class MixRequest(Request):
    """Mix two curvatures, a H_query + (1 - a) H_train.

    With TrackStar's a, directions that are common to all queries count less.
    """

    COMMAND: ClassVar[str] = "mix"
    WRITES: ClassVar[str] = "hessian"
    PANEL: ClassVar[str] = "Curvature"
    run: str = run()
    query: str = argument("The run directory of the queries' curvature.", file=found)
    train: str = argument("The run directory of the training rows' curvature.", file=found)
    components: int = option(
        COMPONENTS, "Directions of the queries to count less.", name="target_downweight_components"
    )
    coefficient: float | None = option(None, "Weight of the queries' curvature.", shown="TrackStar's choice")
    output: RunOptions = group(RunOptions, **ALONE)


@dataclass(frozen=True, kw_only=True)
class MergeRequest(Request):
    """Join the shards of an array job, or several stores.

    What `--shard I/N` wrote becomes what one process would have written. Stores of different rows become one
    store: when a dataset grows, build a store of the new rows alone, and merge.
    """

    COMMAND: ClassVar[str] = "merge"
    WRITES: ClassVar[str] = "store"
    run: str = run("The run directory that the shards were given, or of the store to write.")
    stores: tuple[str, ...] = argument(
        "What gradfn build wrote, of one model and with the same options: its rows, in this order.",
        default=(), metavar="STORE", file=found,
    )  # fmt: skip
    output: RunOptions = group(RunOptions, **ALONE)


@dataclass(frozen=True, kw_only=True)
class MaskFitRequest(ModelRequest):
    """Choose the coordinates of gradients that keep their inner products with queries.

    The gradients are those of a model, or stored ones. Other commands take the mask as --projection
    'selective:RUN', alone or with more behind it.
    """

    COMMAND: ClassVar[str] = "mask fit"
    WRITES: ClassVar[str] = "mask"
    PANEL: ClassVar[str] = "Mask"
    FIRST: ClassVar[tuple[str, ...]] = ("model", "dataset", "query", "keep")
    run: str = run()
    keep: int | tuple[int, int] = option(
        "128x128", "Coordinates: 128x128 of both sides of every block, or 4096 of each flattened.", parse=dims
    )
    rows: int = option(512, "Training rows, and queries at most, to look at.")
    seed: int = option(0, "Which rows, the noise of the start, and what masked-lm masks.")
    query: QueryOptions = group(QueryOptions, **PLAIN_QUERY)
    gradients: GradientOptions = group(
        GradientOptions, projection=None, projection_dim=None, unit_normalize=None
    )
    store: str | None = option(
        None, "Instead of model and dataset: whole gradients, which build wrote.", panel="Data", file=found
    )
    output: RunOptions = group(RunOptions, **ALONE)


@dataclass(frozen=True, kw_only=True)
class RetrainRequest(ModelRequest):
    """Retrain models on subsets: the ground truth of attribution.

    Many models train at once. What is stored is the loss (of classes, the margin too) of every query under
    every model, which `gradfn evaluate` compares with scores. All parameters are trained, without dropout.
    """

    COMMAND: ClassVar[str] = "retrain"
    WRITES: ClassVar[str] = "truth"
    FIRST: ClassVar[tuple[str, ...]] = ("model", "dataset", "query", "subsets", "epochs", "learning_rate")
    run: str = run("The run directory to write truth.h5 to; resumed if the same command made it.")
    model: ModelOptions = group(ModelOptions, token_batch_size=None)
    layers: LayerOptions = group(LayerOptions, include=None, exclude=None, no_biases=None, by=None)
    query: QueryOptions = group(QueryOptions, query_path=None, **PLAIN_QUERY)
    subsets: SubsetOptions = group(SubsetOptions)
    training: TrainingOptions = group(TrainingOptions)
    seed: int = option(0, "Of subsets, data orders, new weights, and what masked-lm masks.", panel="Subsets")
    output: RunOptions = group(RunOptions, fsdp=None)


@dataclass(frozen=True, kw_only=True)
class TrainRequest(ModelRequest):
    """Train a model so that its data can be attributed.

    Checkpoints are models for every other command, with the optimizer's state beside them. Of every step the
    rows, the learning rate, the loss and the gradient's norm are recorded. All parameters are trained, with
    dropout off. A run that is killed goes on with the same command, and ends with the same bits.
    """

    COMMAND: ClassVar[str] = "train"
    WRITES: ClassVar[str] = "training"
    FIRST: ClassVar[tuple[str, ...]] = (
        "model", "dataset", "epochs", "batch_size", "learning_rate", "optimizer", "save_every", "validation"
    )  # fmt: skip
    run: str = run("The run directory to write checkpoints to; resumed if the same command made it.")
    training: TrainOptions = group(TrainOptions, init=None)
    recording: RecordingOptions = group(RecordingOptions)
    gradients: GradientOptions = group(
        GradientOptions, optimizer_state=None,
        projection=option(None, PROJECTION, shown="rademacher:16x16", file=found_projection),
    )  # fmt: skip
    seed: int = option(
        0, "Of the order of rows, new weights, projections, and what masked-lm masks.", panel="Training"
    )
    output: RunOptions = group(RunOptions, **ALONE)

    @property
    def new_weights(self) -> int | None:
        """The seed, where training starts from scratch."""
        return self.seed if self.training.from_scratch else None


@dataclass(frozen=True, kw_only=True)
class SmoothnessRequest(Request):
    """Show whether derivatives through a training predict what removing rows does.

    The training is taken again at random weights of its rows, twice for each direction, to measure how
    straight its end moves. The result is kept in RUN, where `gradfn score --method magic` finds it.
    """

    COMMAND: ClassVar[str] = "smoothness"
    PANEL: ClassVar[str] = "Training"
    FIRST: ClassVar[tuple[str, ...]] = ("query", "fraction", "directions")
    run: str = argument("What gradfn train wrote.", file=found)
    query: QueryOptions = group(QueryOptions, query_path=None, **PLAIN_QUERY)
    model: ModelOptions = group(
        ModelOptions, path=None, revision=None, task=None, tokenizer=None, precision=None, attention=None,
        no_special_tokens=None, token_batch_size=None,
    )  # fmt: skip
    fraction: float = option(0.05, "Share of the rows whose removal is asked about.")
    directions: int = option(3, "Random directions in the weights of the rows; each takes two trainings.")


@dataclass(frozen=True, kw_only=True)
class TuneRequest(ModelRequest):
    """Show which method, projection and damping to trust on this model.

    Half of the time, models are retrained on halves of the rows, two seeds each; the other rows are masked in
    their batches. Then each method scores the rows, at several dampings, and is measured by how well it
    predicts the retrained models (LDS). It stops when the time is up. What was done stays in RUN: the same
    command goes on with it, with new time, and is surer of its answer.
    """

    COMMAND: ClassVar[str] = "tune"
    FIRST: ClassVar[tuple[str, ...]] = (
        "model", "dataset", "query", "minutes", "methods", "init", "epochs", "learning_rate"
    )  # fmt: skip
    run: str = run("The run directory to write to; gone on with if the same command made it.")
    minutes: float = option(10.0, "How long this command may take.", panel="Tuning")
    methods: tuple[str, ...] | None = option(
        None, TUNED, parse=paths, commas=True, shown="all that go with the model", panel="Tuning"
    )
    layers: LayerOptions = group(LayerOptions, by=None)
    query: QueryOptions = group(QueryOptions, query_path=None, **PLAIN_QUERY)
    training: TrainingOptions = group(TrainingOptions)
    seed: int = option(0, "Of halves, data orders, new weights, projections.", panel="Tuning")


@dataclass(frozen=True, kw_only=True)
class InfoRequest(Request):
    """Show what a run holds and how it was made."""

    COMMAND: ClassVar[str] = "info"
    run: str = argument("A run directory, or an .h5 file in it.")
    command: bool = option(False, "Print the command that makes the run again, and nothing else.")
    json: bool = option(False, "Print what is known as JSON: files with rows, command, settings, arrays.")


@dataclass(frozen=True, kw_only=True)
class RerunRequest(Request):
    """Run the command again that made a run.

    Into the same run, which resumes if it is not complete, or into a new one. Tables are shown and not
    exported, and nothing is overwritten. The run may be from somebody else: what it would run code of must be
    given again, and it writes to no other place than itself or --into.
    """

    COMMAND: ClassVar[str] = "rerun"
    run: str = argument("A run directory, or an .h5 file in it.")
    into: str | None = option(None, "The run directory to write instead.", short="-o")
    trust_remote_code: bool = option(False, "The command may run Python code that comes with its models.")
    method: str | None = option(None, "The FILE.py:NAME that the command takes its method from.")


@dataclass(frozen=True, kw_only=True)
class VerifyRequest(Request):
    """Show whether the files of a run hold what was written.

    Every file is read: of shards and checkpoints too. Damaged ones are named, and the command that makes them
    again. --repair removes them, and nothing else, so that the command computes only what they held.
    """

    COMMAND: ClassVar[str] = "verify"
    run: str = argument("A run directory, or an .h5 file in it.")
    repair: bool = option(
        False, "Remove what is damaged, if the run records the command that makes it again."
    )


@dataclass(frozen=True, kw_only=True)
class ImportRequest(Request):
    """Make a store of an index that Bergson wrote.

    `gradfn query` searches it, with --query-path of another index that was imported: the projections are
    Bergson's own, so no model can be asked.
    """

    COMMAND: ClassVar[str] = "import"
    WRITES: ClassVar[str] = "store"
    index: str = argument("The folder with info.json and gradients.bin.", file=found)
    run: str = run()
    output: RunOptions = group(RunOptions, **ALONE)


@dataclass(frozen=True, kw_only=True)
class ExportRequest(Request):
    """Write the gradients of a store to a file of numpy or Parquet.

    A .npy file is a matrix, and a .json file beside it says which columns are those of a block. A .parquet
    file has a column for each block, and the rows' ids and texts.
    """

    COMMAND: ClassVar[str] = "export"
    store: str = argument("A run directory, or the store.h5 in it.", file=found)
    path: str = argument("The file, .npy or .parquet.", file=os.path.abspath)
    memory: int = option(256, "MiB that rows take at a time.")
    output: RunOptions = group(RunOptions, **ALONE)


@dataclass(frozen=True, kw_only=True)
class CheckRequest(ModelRequest):
    """Show what is attributed, whether it is right, and how noisy.

    Coverage of all parameters; the engine against plain autograd; rows in batches against rows alone, and the
    precision against fp32, on a few rows of --dataset, or on random tokens.
    """

    COMMAND: ClassVar[str] = "check"
    model: ModelOptions = group(
        ModelOptions, path=argument("Local folder, .gguf file or hub name.", name="model")
    )
    data: DataOptions = group(DataOptions, **UNWEIGHTED)
    loss: LossOptions = group(
        LossOptions, criterion=None, reference=None, label_smoothing=None, reduction=None
    )
    seed: int = option(0, "What masked-lm masks.", panel="Data")


ATTRIBUTION, CURVATURE, RUNS, TRUTH = "Attribution", "Curvatures and masks", "Runs", "Ground truth"
TRAINING = "Training"
COMMANDS: dict[type[Request], tuple[str, str]] = {
    ScoreRequest: (ATTRIBUTION, "score:run_score"),
    BuildRequest: (ATTRIBUTION, "build:run_build"),
    QueryRequest: (ATTRIBUTION, "query:run_query"),
    SelectRequest: (ATTRIBUTION, "select:run_select"),
    ReduceRequest: (ATTRIBUTION, "build:run_reduce"),
    ReportRequest: (ATTRIBUTION, "page:run_report"),
    HessianRequest: (CURVATURE, "hessian:run_hessian"),
    MixRequest: (CURVATURE, "hessian:run_mix"),
    MaskFitRequest: (CURVATURE, "mask:run_mask_fit"),
    TrainRequest: (TRAINING, "train:run_train"),
    SmoothnessRequest: (TRAINING, "smoothness:run_smoothness"),
    RetrainRequest: (TRUTH, "retrain:run_retrain"),
    TuneRequest: (TRUTH, "tune:run_tune"),
    LdsRequest: (OUTPUT, "evaluate:run_lds"),
    ChangeRequest: (OUTPUT, "evaluate:run_change"),
    LooRequest: (OUTPUT, "evaluate:run_loo"),
    BrittlenessRequest: (OUTPUT, "evaluate:run_brittleness"),
    MislabelRequest: (OUTPUT, "evaluate:run_mislabel"),
    RecallRequest: (OUTPUT, "evaluate:run_recall"),
    OverlapRequest: (OUTPUT, "evaluate:run_overlap"),
    CheckRequest: (RUNS, "check:run_check"),
    InfoRequest: (RUNS, "info:run_info"),
    RerunRequest: (RUNS, "rerun:run_rerun"),
    ImportRequest: (RUNS, "exchange:run_import"),
    ExportRequest: (RUNS, "exchange:run_export"),
    VerifyRequest: (RUNS, "verify:run_verify"),
    MergeRequest: (RUNS, "merge:run_merge"),
}
"""Every command: its panel, and the file and function that run it."""


def spelled(request: Mapping[str, Any], path: Path | None = None) -> str:
    """The command of a record, as it would be typed; for a file of a run that was moved, where the run is."""
    kind = next((one for one in COMMANDS if request["command"] == one.COMMAND), None)
    if kind is None:
        return f"gradfn {request['command']}"
    given = request["given"]
    if path is not None and "run" in given and "shard" not in given:
        from gradfn.store.file import place_of
        from gradfn.store.verify import NESTED

        run, written = place_of(path)
        # A training writes the sums of its values there too; the rows that it records are another run.
        own = {kind.WRITES, *(("scores",) if kind.WRITES == "training" else ())}
        moved = Path(given["run"]).resolve() not in path.resolve().parents and written in own
        if moved and not NESTED.fullmatch(run.name) and not run.name.startswith("baseline-"):
            given = {**given, "run": str(run)}
    return command_line(kind, given)
