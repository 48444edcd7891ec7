"""What scores are worth: ground truth by retraining, the LDS, mislabelled rows, retrieval, agreement."""

from gradfn.evaluate.bootstrap import Estimate
from gradfn.evaluate.ceiling import noise_ceiling, noise_ceiling_estimate
from gradfn.evaluate.change import agreement, changes, flat_weights, padded_weights, step_weights
from gradfn.evaluate.lds import lds, lds_estimate
from gradfn.evaluate.lexical import bm25_ranks
from gradfn.evaluate.mislabel import auroc, average_precision, precision_at
from gradfn.evaluate.overlap import top_overlap
from gradfn.evaluate.retraining import Retraining
from gradfn.evaluate.retrieval import recall_at, reciprocal_rank
from gradfn.evaluate.subsets import leave_one_out, random_subsets
from gradfn.evaluate.truth import Truth, open_truth, retrain

__all__ = [
    "Estimate",
    "Retraining",
    "Truth",
    "agreement",
    "auroc",
    "average_precision",
    "bm25_ranks",
    "changes",
    "flat_weights",
    "lds",
    "lds_estimate",
    "leave_one_out",
    "noise_ceiling",
    "noise_ceiling_estimate",
    "open_truth",
    "padded_weights",
    "precision_at",
    "random_subsets",
    "recall_at",
    "reciprocal_rank",
    "retrain",
    "step_weights",
    "top_overlap",
]
