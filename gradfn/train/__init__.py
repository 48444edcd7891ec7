"""Training as a pure, twice differentiable function, of many models at once."""

from gradfn.train.training import State, Training, make_step, make_trainer, train

__all__ = [
    "State",
    "Training",
    "make_step",
    "make_trainer",
    "train",
]
