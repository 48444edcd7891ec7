"""How a model is trained: the optimizer, its schedule and the batches, as one value."""

from dataclasses import asdict, dataclass
from math import inf
from typing import Any, Literal, get_args

from gradfn.errors import InputError

Optimizer = Literal["sgd", "adam", "adamw", "muon"]
Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Training:
    """How a model is trained: steps on mini-batches of the mean loss, by the formulas of `torch.optim`.

    Args:
        epochs: passes over the rows.
        batch_size: rows a step; the last step of an epoch takes the rows that are left.
        learning_rate: before the schedule.
        optimizer: "sgd", "adam" (weight decay is added to the gradient), "adamw" (it shrinks the weights) or
            "muon" (it steps matrices along their orthogonalised momentum, and the rest by adamw; see
            `gradfn.train.update`).
        momentum, nesterov: of sgd and muon.
        betas, eps: of adam, adamw, and the part of muon that is adamw.
        weight_decay: in the convention of the optimizer.
        schedule: of the learning rate after the warmup: "constant", or "linear" or "cosine" down to zero.
        warmup: steps over which the learning rate rises from zero.
        eps_root: like eps; added to the second moment before its root, after the bias correction.
        max_grad_norm: the gradient is scaled down to this norm, taken over all parameters; None: never.

    Raises:
        InputError: a number out of its range, an unknown name, momentum with adam or adamw, muon without,
            eps_root with sgd.

    >>> Training(epochs=3, batch_size=8, learning_rate=0.1, optimizer="sgd").momentum
    0.0
    """

    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: Optimizer = "adamw"
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    warmup: int = 0
    eps_root: float = 0.0
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        for name, choices in (("optimizer", get_args(Optimizer)), ("schedule", get_args(Schedule))):
            if getattr(self, name) not in choices:
                raise InputError(f"no {name} {getattr(self, name)!r}: choose {', '.join(choices)}")
        for name, valid, wanted in (
            ("epochs", self.epochs >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("learning_rate", 0 < self.learning_rate < inf, "above 0, and finite"),
            ("momentum", 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "at least 0 and below 1"),
            ("eps", 0 < self.eps < inf, "above 0, and finite"),
            ("weight_decay", 0 <= self.weight_decay < inf, "0 or more, and finite"),
            ("warmup", self.warmup >= 0, "0 or more"),
            ("eps_root", 0 <= self.eps_root < inf, "0 or more, and finite"),
            ("max_grad_norm", self.max_grad_norm is None or 0 < self.max_grad_norm < inf,
             "above 0, and finite, or None"),
        ):  # fmt: skip
            if not valid:
                raise InputError(f"{name} must be {wanted}, not {getattr(self, name)}")
        if self.optimizer in ("adam", "adamw") and (self.momentum or self.nesterov):
            raise InputError(
                f"momentum and nesterov are settings of sgd and muon, but the optimizer is {self.optimizer}: "
                "leave them out, or use one of these"
            )
        if self.optimizer == "muon" and not self.momentum:
            raise InputError("muon needs a momentum above 0: give 0.95, which is usual, with nesterov")
        if self.optimizer == "sgd" and self.eps_root:
            raise InputError("eps_root is no setting of sgd, which has no second moment: leave it out")
        if self.nesterov and not self.momentum:
            raise InputError("nesterov needs a momentum above 0: give one, or leave nesterov out")

    def settings(self) -> dict[str, Any]:
        """What a run records of the training."""
        later = {"eps_root": 0.0, "max_grad_norm": None}  # fields that earlier runs did not record
        return {name: value for name, value in asdict(self).items() if (name, value) not in later.items()}
