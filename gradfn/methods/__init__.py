"""Attribution methods: inner products in the geometry of a curvature, their best rows, recipes by name."""

from gradfn.methods.attribution import Attribution, Joined, Scorer
from gradfn.methods.datainf import DataInf
from gradfn.methods.dda import dda
from gradfn.methods.dynamics import Dynamics
from gradfn.methods.grad_cosine import grad_cosine
from gradfn.methods.grad_dot import grad_dot
from gradfn.methods.influence import influence, relatif, trackstar
from gradfn.methods.inner_product import InnerProduct
from gradfn.methods.recipes import RECIPES, Problem, Recipe, over_checkpoints, recipe_named
from gradfn.methods.scoring import best, dots, rerank, score
from gradfn.methods.source import Checkpoint, Segment, Source, source
from gradfn.scores import TopK, extremes, top_k

__all__ = [
    "RECIPES",
    "Attribution",
    "Checkpoint",
    "DataInf",
    "Dynamics",
    "InnerProduct",
    "Joined",
    "Problem",
    "Recipe",
    "Scorer",
    "Segment",
    "Source",
    "TopK",
    "best",
    "dda",
    "dots",
    "extremes",
    "grad_cosine",
    "grad_dot",
    "influence",
    "over_checkpoints",
    "recipe_named",
    "relatif",
    "rerank",
    "score",
    "source",
    "top_k",
    "trackstar",
]
