"""Transforms of gradient blocks: project, normalize, score, and the chain that composes them."""

from gradfn.transforms.chain import Blockwise, Chain, Kronecker, Rowwise, Transform, chain
from gradfn.transforms.dot import Dot, SelfDot, dot
from gradfn.transforms.fitted import Principal, principal, selected
from gradfn.transforms.joint import Joint, joint
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
from gradfn.transforms.projection import parse_projection, reseeded

__all__ = [
    "Adafactor",
    "Adam",
    "Blockwise",
    "Chain",
    "Compress",
    "Dot",
    "Joint",
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
    "joint",
    "lower",
    "parse_projection",
    "precondition",
    "principal",
    "project",
    "reseeded",
    "selected",
    "unit_normalize",
]
