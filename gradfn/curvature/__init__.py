"""Curvatures fitted over data: second moments, K-FAC, EK-FAC, Shampoo, TKFAC."""

from gradfn.curvature.curvature import Curvature, mix, mixing_coefficient
from gradfn.curvature.kfac import ekfac, kfac, tkfac
from gradfn.curvature.second_moment import second_moment
from gradfn.curvature.shampoo import shampoo

__all__ = [
    "Curvature",
    "ekfac",
    "kfac",
    "mix",
    "mixing_coefficient",
    "second_moment",
    "shampoo",
    "tkfac",
]
