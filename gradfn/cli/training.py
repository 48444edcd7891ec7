"""The options of `gradfn retrain` and `gradfn train`: how models are trained."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from gradfn.cli.options import QUERY_SPLIT, Normalize
from gradfn.cli.request import found, option
from gradfn.errors import InputError

if TYPE_CHECKING:
    from gradfn.train.spec import Training

Optimizer = Literal["sgd", "adam", "adamw", "muon"]
Schedule = Literal["constant", "linear", "cosine"]
Init = Literal["given", "random"]
ValueKind = Literal["influence", "shapley", "frozen", "before"]
RowScale = Literal["none", "before", "after"]
StoredDtype = Literal["float32", "float16"]

_BETAS = "Of all but sgd: the decays of the mean of gradients and of their squares."
_SAVE = "Steps between checkpoints, or epoch: one after each. The last step always has one."
_VALUES = "Queries: what each row does to their losses is summed over the steps, to scores.h5 in RUN."
_RECORD = "Write the gradient of every row at every step to this run; the training stays the same."
_SCALE = "Divide recorded rows by the root of Adam's second moment, before the row's step or after it."
_NORMALIZE = "What a step takes the mean over: its rows' losses, or all of their supervised tokens."


def betas(text: str) -> tuple[float, float]:
    """Two numbers with a comma between.

    >>> betas("0.9,0.95")
    (0.9, 0.95)
    """
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--betas {text} are not two numbers: give 0.9,0.999, say") from None
    return first, second


def save_every(text: str) -> int | Literal["epoch"]:
    """A number of steps, or "epoch".

    >>> save_every("100"), save_every("epoch")
    (100, 'epoch')
    """
    if text == "epoch":
        return "epoch"
    if not (text.isascii() and text.isdigit() and int(text)):
        raise InputError(f"--save-every {text}: give a number of steps, 1 or more, or epoch")
    return int(text)


@dataclass(frozen=True)
class TrainingOptions:
    """How models are retrained."""

    PANEL: ClassVar[str] = "Training"
    epochs: int = option(3, "Passes over a subset.")
    batch_size: int = option(8, "Rows a step.")
    optimizer: Optimizer = option(
        "adamw", "As in torch.optim; muon leaves embeddings, heads and vectors to adamw."
    )
    learning_rate: float = option(1e-3, "Before the schedule.")
    momentum: float = option(0.0, "Of sgd, and of muon, which needs one: .95, say.")
    nesterov: bool = option(False, "Of sgd and muon, with a momentum.")
    betas: tuple[float, float] = option("0.9,0.999", _BETAS, parse=betas, commas=True)
    eps: float = option(1e-8, "Of all but sgd: added to the root of the second moment.")
    weight_decay: float = option(0.0, "In the convention of the optimizer.")
    schedule: Schedule = option("constant", "Of the learning rate after the warmup; down to 0.")
    warmup: int = option(0, "Steps over which the learning rate rises from 0.")
    eps_root: float = option(0.0, "Of all but sgd: added to the second moment inside its root.")
    max_grad_norm: float | None = option(None, "Scale gradients down to this norm over all parameters.")
    init: Init = option("given", "Start from the weights of --model, or from new ones of its architecture.")

    def training(self) -> "Training":
        """The training, refused before anything is loaded where it makes no sense."""
        from gradfn.train.spec import Training

        return Training(
            self.epochs, self.batch_size, self.learning_rate, self.optimizer, momentum=self.momentum,
            weight_decay=self.weight_decay, schedule=self.schedule, warmup=self.warmup,
            eps_root=self.eps_root, max_grad_norm=self.max_grad_norm, nesterov=self.nesterov,
            betas=self.betas, eps=self.eps,
        )  # fmt: skip


@dataclass(frozen=True)
class TrainOptions(TrainingOptions):
    """How one model is trained, and when it is saved."""

    normalize: Normalize = option("rows", _NORMALIZE)
    from_scratch: bool = option(False, "Start from new weights, of --seed: --model needs but a config.json.")
    save_every: int | Literal["epoch"] = option("epoch", _SAVE, parse=save_every)
    validation: str | None = option(None, "Rows whose loss is logged at every checkpoint.", file=found)
    validation_split: str | None = option(
        None, QUERY_SPLIT.replace("--query", "--validation"), shown="the only one"
    )

    values: str | None = option(None, _VALUES, file=found)
    values_split: str | None = option(None, QUERY_SPLIT.replace("--query", "--values"), shown="the only one")
    values_kind: ValueKind = option(
        "shapley", "How the optimizer's part in a step is shared out over its rows."
    )
    values_every: int = option(1, "Steps from one that is valued to the next.")


@dataclass(frozen=True)
class RecordingOptions:
    """What is recorded of the rows while a model is trained."""

    PANEL: ClassVar[str] = "Recording"
    record: str | None = option(None, _RECORD, file=os.path.abspath)
    record_normalize: RowScale = option("none", _SCALE)
    record_dtype: StoredDtype = option("float32", "Of the recorded gradients.")
