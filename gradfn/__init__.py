"""gradfn: which training examples made the model do this?

Per-example gradients as pure functions on `torch.func`; every attribution method is a chain of pure
transforms, project -> normalize -> precondition -> score. Names load when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gradfn.data import Documents, collate, make_documents
    from gradfn.errors import InputError, StorageError
    from gradfn.fold import Fold, adam_moments, fit, mean, total
    from gradfn.heads import Heads
    from gradfn.hf.datasets import load_rows, text_query, tokenize
    from gradfn.hf.models import load_model, load_tokenizer
    from gradfn.kron import Kron
    from gradfn.layers import View, blocks_of, find_sites, uncovered
    from gradfn.losses import advantages, causal_lm_loss, linear_cross_entropy, model_loss
    from gradfn.methods import grad_cosine, grad_dot
    from gradfn.per_example import params_of, per_example_grads
    from gradfn.probes import probe_engine
    from gradfn.runs import build, reduce, score_run
    from gradfn.scoring import Method, best, dots, score, top_k
    from gradfn.store import open_store, open_writer
    from gradfn.stream import collect
    from gradfn.transforms import adafactor, adam, chain, dot, project, unit_normalize

_HOME = {
    "collect": "stream", "Documents": "data", "collate": "data", "make_documents": "data",
    "InputError": "errors", "StorageError": "errors",
    "Fold": "fold", "adam_moments": "fold", "fit": "fold", "mean": "fold", "total": "fold",
    "load_rows": "hf.datasets", "text_query": "hf.datasets", "tokenize": "hf.datasets",
    "load_model": "hf.models", "load_tokenizer": "hf.models",
    "Heads": "heads", "View": "layers",
    "Kron": "kron", "blocks_of": "layers", "find_sites": "layers", "uncovered": "layers",
    "advantages": "losses", "causal_lm_loss": "losses", "linear_cross_entropy": "losses",
    "model_loss": "losses",
    "grad_cosine": "methods", "grad_dot": "methods",
    "params_of": "per_example", "per_example_grads": "per_example", "probe_engine": "probes",
    "build": "runs", "reduce": "runs", "score_run": "runs",
    "Method": "scoring", "best": "scoring", "dots": "scoring", "score": "scoring", "top_k": "scoring",
    "open_store": "store", "open_writer": "store",
    "adafactor": "transforms", "adam": "transforms", "chain": "transforms", "dot": "transforms",
    "project": "transforms", "unit_normalize": "transforms",
}  # fmt: skip

__all__ = [
    "Documents", "Fold", "Heads", "InputError", "Kron", "Method", "StorageError", "View", "adafactor",
    "adam", "adam_moments", "advantages", "best", "blocks_of", "build", "causal_lm_loss", "chain", "collate",
    "collect", "dot", "dots", "find_sites", "fit", "grad_cosine", "grad_dot", "linear_cross_entropy",
    "load_model", "load_rows", "load_tokenizer", "make_documents", "mean", "model_loss", "open_store",
    "open_writer", "params_of", "per_example_grads", "probe_engine", "project", "reduce", "score",
    "score_run", "text_query", "tokenize", "top_k", "total", "uncovered", "unit_normalize",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gradfn' has no attribute {name!r}")

    value = getattr(import_module(f"gradfn.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
