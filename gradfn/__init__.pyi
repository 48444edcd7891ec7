from . import bridges as bridges
from . import data as data
from . import engine as engine
from . import evaluate as evaluate
from . import exact as exact
from . import example as example
from . import hf as hf
from . import linalg as linalg
from . import methods as methods
from . import model as model
from . import report as report
from . import runs as runs
from . import statistics as statistics
from . import store as store
from . import testing as testing
from . import train as train
from . import transforms as transforms
from .data import Documents, make_documents
from .engine import collect, per_example_grads, probe_engine, tap
from .errors import InputError, StorageError
from .evaluate import retrain
from .hf import load_model, load_rows, load_tokenizer, text_query, tokenize
from .linalg import Damping
from .methods import best, grad_cosine, grad_dot, influence, relatif, score, top_k, trackstar
from .model import View, causal_lm_loss, model_loss
from .runs import build, hessian, open_store, query, reduce, trace
from .scores import Scores
from .statistics import (
    adam_moments,
    ekfac,
    eshampoo,
    fit,
    kfac,
    mean,
    mix,
    second_moment,
    shampoo,
    tkfac,
)
from .subject import Subject
from .transforms import (
    adam,
    chain,
    compress,
    dot,
    joint,
    precondition,
    project,
    unit_normalize,
)

__version__: str

__all__ = [
    "Damping",
    "Documents",
    "InputError",
    "Scores",
    "StorageError",
    "Subject",
    "View",
    "adam",
    "adam_moments",
    "best",
    "bridges",
    "build",
    "causal_lm_loss",
    "chain",
    "collect",
    "compress",
    "data",
    "dot",
    "ekfac",
    "engine",
    "eshampoo",
    "evaluate",
    "exact",
    "example",
    "fit",
    "grad_cosine",
    "grad_dot",
    "hessian",
    "hf",
    "influence",
    "joint",
    "kfac",
    "linalg",
    "load_model",
    "load_rows",
    "load_tokenizer",
    "make_documents",
    "mean",
    "methods",
    "mix",
    "model",
    "model_loss",
    "open_store",
    "per_example_grads",
    "precondition",
    "probe_engine",
    "project",
    "query",
    "reduce",
    "relatif",
    "report",
    "retrain",
    "runs",
    "score",
    "second_moment",
    "shampoo",
    "statistics",
    "store",
    "tap",
    "testing",
    "text_query",
    "tkfac",
    "tokenize",
    "top_k",
    "trace",
    "trackstar",
    "train",
    "transforms",
    "unit_normalize",
]
