"""For tests of estimators: laws in one line, Hypothesis strategies, and the naive loops behind them."""

from gradfn.engine.reference import naive_blocks
from gradfn.testing.estimators import check_estimator
from gradfn.testing.folds import check_fold
from gradfn.testing.layers import check_layer
from gradfn.testing.models import convnets, encoders, language_models, mlps, seeds
from gradfn.testing.naive import (
    assert_blocks_close,
    chain_difference,
    difference,
    naive_causal_lm_loss,
    recorded_shapes,
)
from gradfn.testing.profiles import load_profile
from gradfn.testing.search import BrokenLawError
from gradfn.testing.strategies import (
    Problem,
    blocks,
    chains,
    dampings,
    encoder_rows,
    image_rows,
    problems,
    spectra,
    token_rows,
    vector_rows,
    views,
)
from gradfn.testing.transforms import check_transform

__all__ = [
    "BrokenLawError",
    "Problem",
    "assert_blocks_close",
    "blocks",
    "chain_difference",
    "chains",
    "check_estimator",
    "check_fold",
    "check_layer",
    "check_transform",
    "convnets",
    "dampings",
    "difference",
    "encoder_rows",
    "encoders",
    "image_rows",
    "language_models",
    "load_profile",
    "mlps",
    "naive_blocks",
    "naive_causal_lm_loss",
    "problems",
    "recorded_shapes",
    "seeds",
    "spectra",
    "token_rows",
    "vector_rows",
    "views",
]
