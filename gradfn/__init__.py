"""gradfn: which training examples made the model do this?

Per-example gradients as pure functions on `torch.func`; every attribution method is a chain of pure
transforms, project -> normalize -> precondition -> score. Names load when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gradfn.curvature import (
        Curvature,
        ekfac,
        kfac,
        mix,
        mixing_coefficient,
        second_moment,
        shampoo,
        tkfac,
    )
    from gradfn.data import Documents, collate, make_documents
    from gradfn.errors import InputError, StorageError
    from gradfn.evaluate.bootstrap import Estimate
    from gradfn.evaluate.ceiling import noise_ceiling, noise_ceiling_estimate
    from gradfn.evaluate.lds import lds, lds_estimate
    from gradfn.evaluate.mislabel import auroc, average_precision, precision_at
    from gradfn.evaluate.overlap import top_overlap
    from gradfn.evaluate.retrieval import recall_at, reciprocal_rank
    from gradfn.evaluate.subsets import leave_one_out, random_subsets
    from gradfn.evaluate.truth import Truth, open_truth, retrain
    from gradfn.fold import Fold, adafactor_moments, adam_moments, fit, mean, total
    from gradfn.heads import Heads
    from gradfn.hessians import hessian, load_curvature, mix_runs
    from gradfn.hf.datasets import load_rows, text_query, tokenize
    from gradfn.hf.models import load_model, load_tokenizer
    from gradfn.kept import Kept
    from gradfn.kron import Kron
    from gradfn.losses import advantages, causal_lm_loss, linear_cross_entropy, model_loss
    from gradfn.masks import load_mask, projection_named
    from gradfn.methods import Problem, Recipe, grad_cosine, grad_dot, influence, relatif, trackstar
    from gradfn.per_example import params_of, per_example_grads
    from gradfn.probes import probe_engine
    from gradfn.report.plots import Point, plot_lds
    from gradfn.runs import build, reduce, score_run
    from gradfn.sampling import sample_labels
    from gradfn.scoring import Method, best, dots, score, top_k
    from gradfn.selective import fit_mask, selective_mask
    from gradfn.sites import View, blocks_of, find_sites, uncovered
    from gradfn.spectrum import Damping
    from gradfn.store import open_store, open_writer
    from gradfn.stream import collect
    from gradfn.training import Training, train
    from gradfn.transforms import (
        adafactor,
        adam,
        chain,
        compress,
        dot,
        precondition,
        principal,
        project,
        unit_normalize,
    )
    from gradfn.transforms.fitted import selected
    from gradfn.transforms.joint import joint
    from gradfn.transforms.projection import parse_projection

_HOME = {
    "collect": "stream", "Documents": "data", "collate": "data", "make_documents": "data",
    "InputError": "errors", "StorageError": "errors",
    "Estimate": "evaluate.bootstrap", "noise_ceiling": "evaluate.ceiling",
    "noise_ceiling_estimate": "evaluate.ceiling", "lds": "evaluate.lds", "lds_estimate": "evaluate.lds",
    "auroc": "evaluate.mislabel", "average_precision": "evaluate.mislabel",
    "precision_at": "evaluate.mislabel", "top_overlap": "evaluate.overlap",
    "recall_at": "evaluate.retrieval", "reciprocal_rank": "evaluate.retrieval",
    "Point": "report.plots", "plot_lds": "report.plots",
    "Fold": "fold", "adafactor_moments": "fold", "adam_moments": "fold", "fit": "fold", "mean": "fold",
    "total": "fold",
    "load_rows": "hf.datasets", "text_query": "hf.datasets", "tokenize": "hf.datasets",
    "load_model": "hf.models", "load_tokenizer": "hf.models",
    "Curvature": "curvature", "ekfac": "curvature", "kfac": "curvature", "mix": "curvature",
    "mixing_coefficient": "curvature", "second_moment": "curvature", "shampoo": "curvature",
    "tkfac": "curvature", "Damping": "spectrum", "sample_labels": "sampling", "precondition": "transforms",
    "Problem": "methods", "Recipe": "methods", "influence": "methods", "relatif": "methods",
    "trackstar": "methods", "hessian": "hessians", "load_curvature": "hessians", "mix_runs": "hessians",
    "Heads": "heads", "View": "sites",
    "Kept": "kept", "Kron": "kron", "blocks_of": "sites", "find_sites": "sites", "uncovered": "sites",
    "advantages": "losses", "causal_lm_loss": "losses", "linear_cross_entropy": "losses",
    "model_loss": "losses",
    "grad_cosine": "methods", "grad_dot": "methods",
    "params_of": "per_example", "per_example_grads": "per_example", "probe_engine": "probes",
    "build": "runs", "reduce": "runs", "score_run": "runs",
    "Method": "scoring", "best": "scoring", "dots": "scoring", "score": "scoring", "top_k": "scoring",
    "open_store": "store", "open_writer": "store",
    "adafactor": "transforms", "adam": "transforms", "chain": "transforms", "dot": "transforms",
    "project": "transforms", "unit_normalize": "transforms", "compress": "transforms",
    "principal": "transforms", "selected": "transforms.fitted", "joint": "transforms.joint",
    "parse_projection": "transforms.projection", "fit_mask": "selective", "selective_mask": "selective",
    "load_mask": "masks", "projection_named": "masks", "Training": "training", "train": "training",
    "random_subsets": "evaluate.subsets", "leave_one_out": "evaluate.subsets",
    "Truth": "evaluate.truth", "open_truth": "evaluate.truth", "retrain": "evaluate.truth",
}  # fmt: skip

__all__ = [
    "Curvature", "Damping", "Documents", "Estimate", "Fold", "Heads", "InputError", "Kept", "Kron",
    "Method", "Point", "Problem", "Recipe", "StorageError", "Training", "Truth", "View", "adafactor",
    "adafactor_moments", "adam", "adam_moments", "advantages", "auroc", "average_precision", "best",
    "blocks_of", "build", "causal_lm_loss", "chain", "collate", "collect", "compress", "dot", "dots",
    "ekfac", "find_sites", "fit", "fit_mask", "grad_cosine", "grad_dot", "hessian", "influence", "joint",
    "kfac", "lds", "lds_estimate", "leave_one_out", "linear_cross_entropy", "load_curvature",
    "load_mask", "load_model", "load_rows", "load_tokenizer", "make_documents", "mean", "mix",
    "mix_runs", "mixing_coefficient", "model_loss", "noise_ceiling", "noise_ceiling_estimate",
    "open_store", "open_truth", "open_writer", "params_of", "parse_projection", "per_example_grads",
    "plot_lds", "precision_at", "precondition", "principal", "probe_engine", "project",
    "projection_named", "random_subsets", "recall_at", "reciprocal_rank", "reduce", "relatif", "retrain",
    "sample_labels", "score", "score_run", "second_moment", "selected", "selective_mask", "shampoo",
    "text_query", "tkfac", "tokenize", "top_k", "top_overlap", "total", "trackstar", "train",
    "uncovered", "unit_normalize",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gradfn' has no attribute {name!r}")

    value = getattr(import_module(f"gradfn.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
