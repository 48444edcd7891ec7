"""Exact curvature products, and solves with them."""

from gradfn.exact.outputs import SplitLoss, outputs_and_loss
from gradfn.exact.products import fisher_product, gauss_newton_product, hessian_product
from gradfn.exact.solvers import Eigenpairs, Solution, arnoldi, cg, largest_eigenvalue, lissa
from gradfn.exact.vectors import Product, params_of_blocks

__all__ = [
    "Eigenpairs",
    "Product",
    "Solution",
    "SplitLoss",
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
