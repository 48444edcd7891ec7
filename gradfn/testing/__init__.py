"""For tests of estimators: Hypothesis strategies, and the naive loops that every engine must equal."""

from gradfn.testing.naive import assert_blocks_close, naive_blocks, naive_causal_lm_loss, recorded_shapes
from gradfn.testing.profiles import load_profile
from gradfn.testing.strategies import (
    Problem,
    chains,
    language_models,
    mlps,
    problems,
    seeds,
    token_rows,
    vector_rows,
)

__all__ = [
    "Problem",
    "assert_blocks_close",
    "chains",
    "language_models",
    "load_profile",
    "mlps",
    "naive_blocks",
    "naive_causal_lm_loss",
    "problems",
    "recorded_shapes",
    "seeds",
    "token_rows",
    "vector_rows",
]
