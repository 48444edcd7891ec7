"""Training as a pure, twice differentiable function, of many models at once."""

from gradfn.train.descend import Descended, descend
from gradfn.train.dots import Values, optimizer_state, values
from gradfn.train.hf_trainer import record_trainer
from gradfn.train.in_run import InRun, InRunTotals, Totals, in_run, step_direction
from gradfn.train.magic import Magic, Metagradient, metagradient
from gradfn.train.optimizers import State, first_state, learning_rate, update
from gradfn.train.parts import RecordOptions
from gradfn.train.pull import Adjoint, pull
from gradfn.train.record import Recorder, recording
from gradfn.train.replay import Replay
from gradfn.train.select import reweight, select
from gradfn.train.smoothness import Smoothness, metasmoothness
from gradfn.train.spec import Training
from gradfn.train.split import SplitLoss
from gradfn.train.stacked import Start, alone_if_needed, initial_params, losses_at, stacked_losses
from gradfn.train.step import Losses, losses_of, make_step
from gradfn.train.table import Table, table_of
from gradfn.train.trainer import Progress, Step, Trained, Trainer, make_trainer, train

__all__ = [
    "Adjoint",
    "Descended",
    "InRun",
    "InRunTotals",
    "Losses",
    "Magic",
    "Metagradient",
    "Progress",
    "RecordOptions",
    "Recorder",
    "Replay",
    "Smoothness",
    "SplitLoss",
    "Start",
    "State",
    "Step",
    "Table",
    "Totals",
    "Trained",
    "Trainer",
    "Training",
    "Values",
    "alone_if_needed",
    "descend",
    "first_state",
    "in_run",
    "initial_params",
    "learning_rate",
    "losses_at",
    "losses_of",
    "make_step",
    "make_trainer",
    "metagradient",
    "metasmoothness",
    "optimizer_state",
    "pull",
    "record_trainer",
    "recording",
    "reweight",
    "select",
    "stacked_losses",
    "step_direction",
    "table_of",
    "train",
    "update",
    "values",
]
