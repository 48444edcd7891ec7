"""Per-example gradients: their definition, the probes that compute the same faster, streams over data."""

from gradfn.engine.cache import CachedRows
from gradfn.engine.check import coverage, equality, noise
from gradfn.engine.engine import Engine, probe_engine
from gradfn.engine.reference import naive_blocks, naive_grads, per_example_grads
from gradfn.engine.stream import collect, gather
from gradfn.engine.tap import Tapped, tap

__all__ = [
    "CachedRows",
    "Engine",
    "Tapped",
    "collect",
    "coverage",
    "equality",
    "gather",
    "naive_blocks",
    "naive_grads",
    "noise",
    "per_example_grads",
    "probe_engine",
    "tap",
]
