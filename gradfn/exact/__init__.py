"""Exact curvature products, and solves with them."""

from gradfn.exact.exact import (
    Eigenpairs,
    Solution,
    arnoldi,
    cg,
    fisher_product,
    gauss_newton_product,
    hessian_product,
    largest_eigenvalue,
    lissa,
    outputs_and_loss,
    params_of_blocks,
)

__all__ = [
    "Eigenpairs",
    "Solution",
    "arnoldi",
    "cg",
    "fisher_product",
    "gauss_newton_product",
    "hessian_product",
    "largest_eigenvalue",
    "lissa",
    "outputs_and_loss",
    "params_of_blocks",
]
