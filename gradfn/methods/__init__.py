"""Attribution methods, each a few lines: what is done to the training side and to the query side."""

from gradfn.methods.datainf import DataInf
from gradfn.methods.grad_cosine import grad_cosine
from gradfn.methods.grad_dot import grad_dot
from gradfn.methods.influence import influence, relatif, trackstar
from gradfn.methods.recipes import RECIPES, Problem, Recipe, recipe_named

__all__ = [
    "RECIPES",
    "DataInf",
    "Problem",
    "Recipe",
    "grad_cosine",
    "grad_dot",
    "influence",
    "recipe_named",
    "relatif",
    "trackstar",
]
