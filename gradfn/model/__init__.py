"""What is differentiated: parameters, losses, layers and the weights that have a block."""

from gradfn.model.fingerprint import model_fingerprint
from gradfn.model.heads import Heads
from gradfn.model.left_out import uncovered
from gradfn.model.losses import (
    CausalLMLoss,
    ModelLoss,
    advantages,
    causal_lm_loss,
    linear_cross_entropy,
    model_loss,
)
from gradfn.model.params import call, params_of
from gradfn.model.sharded import in_turns, shard_model
from gradfn.model.sites import Site, View, blocks_of, find_sites

__all__ = [
    "CausalLMLoss",
    "Heads",
    "ModelLoss",
    "Site",
    "View",
    "advantages",
    "blocks_of",
    "call",
    "causal_lm_loss",
    "find_sites",
    "in_turns",
    "linear_cross_entropy",
    "model_fingerprint",
    "model_loss",
    "params_of",
    "shard_model",
    "uncovered",
]
