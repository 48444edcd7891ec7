"""Weights of rows, visits and tokens: what the parts of the loss of a training are multiplied by."""

from jaxtyping import Float
from torch import Tensor

from gradfn.errors import InputError


def placed_weights(
    weights: Float[Tensor, "*axes"], epochs: int, rows: int, longest: int
) -> Float[Tensor, "visits rows tokens"]:
    """Weights as `[epochs or 1, rows, tokens or 1]`.

    Args:
        weights: `[rows]`, `[epochs, rows]`, `[rows, tokens]`, or three axes, of which the first and the last
            may be 1.
        epochs, rows: of the training.
        longest: the tokens of the longest row; 1 where rows have none.

    Raises:
        InputError: another shape, or one that may be of visits and of tokens; a number that is not finite.

    >>> import torch
    >>> placed_weights(torch.ones(4, 9), 2, 4, 9).shape, placed_weights(torch.ones(2, 4), 2, 4, 9).shape
    (torch.Size([1, 4, 9]), torch.Size([2, 4, 1]))
    """
    shape = tuple(weights.shape)
    visits, tokens = shape == (epochs, rows), shape == (rows, longest) and longest > 1
    if visits and tokens:
        raise InputError(
            f"`weights` of {[*shape]} may be of {epochs} epochs and {rows} rows, or of {rows} rows and "
            f"{longest} tokens: give them as {[epochs, rows, 1]} or {[1, rows, longest]}"
        )
    three = len(shape) == 3 and shape[0] in (1, epochs) and shape[1] == rows and shape[2] in (1, longest)
    if not (visits or tokens or three or shape == (rows,)) or not bool(weights.isfinite().all()):
        of_tokens = f", or {[rows, longest]}, one for each of its tokens," if longest > 1 else ","
        raise InputError(
            f"expected `weights` of {[rows]} or {[epochs, rows]} finite numbers, one for each row or for "
            f"each of its visits{of_tokens} got {[*shape]}"
        )
    return weights.reshape(shape if three else (1, rows, longest) if tokens else (-1, rows, 1))
