"""Training as a pure, twice differentiable function, of many models at once."""

from gradfn.train.hf_trainer import record_trainer
from gradfn.train.optimizers import State, first_state, learning_rate, update
from gradfn.train.parts import RecordOptions
from gradfn.train.record import Recorder, recording
from gradfn.train.spec import Training
from gradfn.train.stacked import Start, alone_if_needed, initial_params, losses_at, stacked_losses
from gradfn.train.step import Losses, losses_of, make_step
from gradfn.train.table import Table, table_of
from gradfn.train.trainer import Progress, Step, Trained, Trainer, make_trainer, train

__all__ = [
    "Losses",
    "Progress",
    "RecordOptions",
    "Recorder",
    "Start",
    "State",
    "Step",
    "Table",
    "Trained",
    "Trainer",
    "Training",
    "alone_if_needed",
    "first_state",
    "initial_params",
    "learning_rate",
    "losses_at",
    "losses_of",
    "make_step",
    "make_trainer",
    "record_trainer",
    "recording",
    "stacked_losses",
    "table_of",
    "train",
    "update",
]
