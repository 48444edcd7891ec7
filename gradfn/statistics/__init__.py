"""Statistics fitted over data: moments, curvatures, labels drawn from the model, masks."""

from gradfn.statistics.curvature import Curvature, mix, mixing_coefficient
from gradfn.statistics.fold import Fold, fit
from gradfn.statistics.kfac import ekfac, kfac, tkfac
from gradfn.statistics.labels import sample_labels
from gradfn.statistics.mask import MaskSearch, fit_mask, selective_mask
from gradfn.statistics.moments import adafactor_moments, adam_moments, mean, total
from gradfn.statistics.second_moment import second_moment
from gradfn.statistics.shampoo import eshampoo, shampoo

__all__ = [
    "Curvature",
    "Fold",
    "MaskSearch",
    "adafactor_moments",
    "adam_moments",
    "ekfac",
    "eshampoo",
    "fit",
    "fit_mask",
    "kfac",
    "mean",
    "mix",
    "mixing_coefficient",
    "sample_labels",
    "second_moment",
    "selective_mask",
    "shampoo",
    "tkfac",
    "total",
]
