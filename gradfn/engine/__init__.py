"""Per-example gradients: the definition, the probes that are as right and faster, streams over data."""

from gradfn.engine.cache import Kept
from gradfn.engine.check import coverage, equality, noise
from gradfn.engine.engine import Engine, probe_engine
from gradfn.engine.reference import naive_blocks, naive_grads, per_example_grads
from gradfn.engine.stream import collect, gather

__all__ = [
    "Engine",
    "Kept",
    "collect",
    "coverage",
    "equality",
    "gather",
    "naive_blocks",
    "naive_grads",
    "noise",
    "per_example_grads",
    "probe_engine",
]
