"""Run directories: gradients, scores, curvatures and masks on disk, and what they were made of."""

from gradfn.runs.curvatures import hessian, load_curvature, mix_runs
from gradfn.runs.gradients import build, reduce
from gradfn.runs.masks import load_mask, mask_run, projection_named
from gradfn.runs.merge import hessian_shard, merge_run
from gradfn.runs.nearest import Faiss, find
from gradfn.runs.output import RunOptions
from gradfn.runs.provenance import Provenance
from gradfn.runs.scores import score_run
from gradfn.runs.search import query, query_best
from gradfn.runs.shards import Shard, parse_shard
from gradfn.runs.trace import Traced, trace
from gradfn.store import Store, open_store, open_writer

__all__ = [
    "Faiss",
    "Provenance",
    "RunOptions",
    "Shard",
    "Store",
    "Traced",
    "build",
    "find",
    "hessian",
    "hessian_shard",
    "load_curvature",
    "load_mask",
    "mask_run",
    "merge_run",
    "mix_runs",
    "open_store",
    "open_writer",
    "parse_shard",
    "projection_named",
    "query",
    "query_best",
    "reduce",
    "score_run",
    "trace",
]
