"""Transforms of gradient blocks: project, normalize, score, and the chain that composes them."""

from gradfn.transforms.chain import Blockwise, Chain, Kronecker, Rowwise, Transform, chain
from gradfn.transforms.dot import Dot, SelfDot, dot
from gradfn.transforms.fitted import Principal, principal
from gradfn.transforms.lower import Lowered, lower
from gradfn.transforms.normalize import (
    Adafactor,
    Adam,
    UnitNormalize,
    adafactor,
    adam,
    unit_normalize,
)
from gradfn.transforms.precondition import Precondition, precondition
from gradfn.transforms.project import Compress, Project, compress, project

__all__ = [
    "Adafactor",
    "Adam",
    "Blockwise",
    "Chain",
    "Compress",
    "Dot",
    "Kronecker",
    "Lowered",
    "Precondition",
    "Principal",
    "Project",
    "Rowwise",
    "SelfDot",
    "Transform",
    "UnitNormalize",
    "adafactor",
    "adam",
    "chain",
    "compress",
    "dot",
    "lower",
    "precondition",
    "principal",
    "project",
    "unit_normalize",
]
