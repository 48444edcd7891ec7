"""DDA: inner products at checkpoints of a fine-tuning, less those that the base model already had."""

from collections.abc import Sequence

from gradfn.errors import InputError
from gradfn.methods.attribution import Joined
from gradfn.methods.grad_dot import grad_dot
from gradfn.subject import Subject
from gradfn.transforms import Transform, chain, reseeded


def dda(base: Subject, checkpoints: Sequence[Subject], *stages: Transform, debias: float = 1.0) -> Joined:
    """`score(z, q) = 1/M sum_m <T g_m, T q_m> - debias <T g_0, T q_0>` of M checkpoints and a base model.

    What a row and a query have in common in the model before it was fine-tuned is no trace of the training,
    so it is taken off (debias); the mean over checkpoints smooths what differs from one to another (denoise).

    On the command line these are the options `--method tracin --checkpoints BASE,A,B
    --checkpoint-weights=-1,0.5,0.5`.

    Args:
        base: the model before the training.
        checkpoints: the model during and after it.
        stages: `T`, of both sides; a random projection is another one at each model, see `reseeded`.
        debias: how much of the base model's scores to take off; 0 leaves the mean alone.

    Raises:
        InputError: no checkpoint.

    >>> import torch
    >>> net = torch.nn.Linear(1, 1)
    >>> one = Subject(net, lambda params, example: params["weight"].sum())
    >>> dda(one, [one, one], debias=0.5).weights
    [-0.5, 0.5, 0.5]

    Source: debiasing and denoising: Wu et al., arXiv:2410.01285; here with plain means, and inner products as
    in TracIn, arXiv:2002.08484.
    """
    if not checkpoints:
        raise InputError("there is no checkpoint to take the base model's scores off: give one or more")
    both = chain(*stages)
    parts = [(subject, grad_dot(reseeded(both, m))) for m, subject in enumerate([base, *checkpoints])]
    return Joined(parts, [-debias, *[1 / len(checkpoints)] * len(checkpoints)])
