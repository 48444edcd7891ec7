"""How an optimizer moves weights near a minimum, where the gradient is linear in them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from math import inf
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from gradfn.errors import InputError
from gradfn.linalg.spectrum import Spectrum
from gradfn.subject import Normalize
from gradfn.types import Blocks

OPTIMIZERS = ("sgd", "adam", "adamw")


@dataclass(frozen=True)
class Dynamics:
    """What steps of an optimizer with learning rates of sum `s` do along an eigenvector of the curvature.

    A displacement is multiplied by `S(x)`, and a steady push adds `F(x)` times the push, `x` the eigenvalue:

        S(x) = exp(-s x)           F(x) = (1 - exp(-s x)) / x,     F(0) = s
        S(x) = (1 - eta x)^K       F(x) = (1 - (1 - eta x)^K) / x       with `learning_rate`, K = s / eta

    Momentum multiplies `s` by `1 / (1 - mu)`. With `learning_rate` it is exact: the K-th power of
    `[[mu, x], [-eta mu, 1 - eta x]]`, which acts on momentum and displacement together. Where steps would
    diverge (`eta x >= 1`; with momentum `eta x >= 2 (1 + mu)`) the exponential is taken. A weight decay is
    added to `x`.

    Args:
        optimizer: "sgd", "adam" or "adamw"; of the latter two `x` is an eigenvalue of `P^1/2 H P^1/2`.
        momentum, nesterov: of sgd.
        weight_decay: in the convention of the optimizer; adam's, which is scaled by P, is refused.
        learning_rate: of sgd, where all steps have the same; None: the exponential.
        normalize: what a step takes the mean over, "rows" or "tokens"; see `gradfn.train.course.Course`.

    Raises:
        InputError: a number out of its range, settings of another optimizer.

    >>> S, F = Dynamics().propagator(torch.tensor([[0.0, 1.0]]), 2.0)[0, :, 0].T
    >>> S, F
    (tensor([1.0000, 0.1353]), tensor([2.0000, 0.8647]))

    Source: Bae et al., arXiv:2405.12186, section 3.
    """

    optimizer: str = "sgd"
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    learning_rate: float | None = None
    normalize: Normalize = "rows"

    def __post_init__(self) -> None:
        for name, choices in (("optimizer", OPTIMIZERS), ("normalize", get_args(Normalize))):
            if getattr(self, name) not in choices:
                raise InputError(f"no {name} {getattr(self, name)!r}: choose {', '.join(choices)}")
        rate = self.learning_rate
        for name, valid, wanted in (
            ("momentum", 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("weight_decay", 0 <= self.weight_decay < inf, "0 or more, and finite"),
            ("learning_rate", rate is None or 0 < rate < inf, "above 0, and finite"),
        ):
            if not valid:
                raise InputError(f"{name} must be {wanted}, not {getattr(self, name)}")
        if self.optimizer != "sgd" and (self.momentum or self.nesterov or rate is not None):
            raise InputError(
                f"momentum, nesterov and learning_rate are settings of sgd here, not of {self.optimizer}: "
                "leave them out"
            )
        if self.optimizer == "adam" and self.weight_decay:
            raise InputError(
                "adam scales its weight decay by its second moment, which source cannot follow: train with "
                "adamw, or without decay"
            )

    @property
    def states(self) -> int:
        """How many numbers a weight has: itself, and the momentum where this is followed exactly."""
        return 2 if self.momentum and self.learning_rate is not None else 1

    def settings(self) -> dict[str, Any]:
        """What a run records of it."""
        return asdict(self)

    def propagator(self, x: Float[Tensor, "*axes"], s: float) -> Float[Tensor, "*axes states more"]:
        """`S` of all states (momentum before displacement), and `F` of each as one more column.

        Args:
            x: eigenvalues.
            s: the sum of the learning rates.
        """
        flow = self._flow(x, s)
        if self.learning_rate is None:
            return flow
        steps = max(1, round(s / self.learning_rate))
        eta, mu = s / steps, self.momentum
        seen, kept = (1 + mu, mu) if self.nesterov else (1.0, 1.0)
        limit = 2 * (1 + mu) / (1 + 2 * mu if self.nesterov else 1) if mu else 1.0
        unstable = eta * x >= limit
        x, one = torch.where(unstable, 0.0, x), torch.ones_like(x)
        rows = [[mu, x, -1.0], [-eta * mu * kept, 1 - eta * seen * x, eta * seen], [0.0, 0.0, 1.0]]
        if self.states == 1:
            rows = [row[1:] for row in rows[1:]]
        step = torch.stack([torch.stack([one * entry for entry in row], -1) for row in rows], -2)
        made = torch.linalg.matrix_power(step, steps)[..., :-1, :]
        return torch.where(unstable[..., None, None], pad(flow, (self.states - 1, 0) * 2), made)

    def _flow(self, x: Tensor, s: float) -> Tensor:
        """The exponential's, of the displacement alone."""
        s = s / (1 - self.momentum)
        y = s * x  # whose rounding, where it is next to 0, then does not count
        F = s * torch.where(y > 0, -torch.expm1(-y) / torch.where(y > 0, y, 1.0), 1.0)
        return torch.stack([torch.exp(-y), F], -1)[..., None, :]

    def begin(self, queries: Blocks) -> list[Blocks]:
        """The states of queries at the end of a training, where no momentum counts."""
        zeros = {name: torch.zeros_like(G) for name, G in queries.items()}
        return [*[zeros] * (self.states - 1), queries]

    def back(self, H: Spectrum, s: float, adjoint: Sequence[Tensor]) -> list[Tensor]:
        """The states of queries before steps, from those after them, and at the end `F` of each, summed.

        Args:
            H: the curvature of a block during these steps.
            s: the sum of their learning rates.
            adjoint: derivatives of the queries in the states, each `[queries, out, in]`.
        """
        filtered = H.filtered(lambda x: x + self.weight_decay)
        shape = (adjoint[0].shape[-2], adjoint[0].shape[-1])
        after = torch.stack([H.into(G) for G in adjoint])
        through = self.propagator(filtered.values, s).to(after)
        before = torch.einsum("aqij,ijab->bqij", after, through)
        return [H.back(G, shape) for G in before]


def parse_dynamics(text: str, normalize: Normalize = "rows") -> Dynamics:
    """An optimizer as the command line spells it: its name, and behind a colon its settings.

    Raises:
        InputError: no such optimizer or setting, or no number.

    >>> parse_dynamics("sgd:momentum=0.9") == Dynamics("sgd", momentum=0.9)
    True
    """
    name, _, rest = text.partition(":")
    known, given = [field.name for field in fields(Dynamics)[1:-1]], dict[str, Any]()
    for part in filter(None, rest.split(",")):
        key, _, value = (piece.strip() for piece in part.partition("="))
        try:
            given[key.replace("-", "_")] = value == "true" if value in ("true", "false") else float(value)
        except ValueError:
            raise InputError(f"{part!r} is no setting of an optimizer: give momentum=0.9, say") from None
    if unknown := [key for key in given if key not in known]:
        raise InputError(f"no setting {unknown[0]!r} of an optimizer: choose {', '.join(known)}")
    return Dynamics(name.strip(), **given, normalize=normalize)
