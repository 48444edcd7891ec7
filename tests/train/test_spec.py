from dataclasses import replace

import pytest

from gradfn.errors import InputError
from gradfn.train import (
    Training,
)


@pytest.mark.parametrize(("changes", "says"), [
    ({"epochs": 0}, "epochs must be 1 or more"), ({"batch_size": 0}, "batch_size must be"),
    ({"learning_rate": 0.0}, "learning_rate must be above 0"), ({"eps": 0.0}, "eps must be"),
    ({"learning_rate": float("nan")}, "learning_rate"), ({"betas": (0.9, 1.0)}, "betas must be"),
    ({"learning_rate": float("inf")}, "learning_rate must be above 0, and finite, not inf"),
    ({"weight_decay": float("inf")}, "weight_decay must be 0 or more, and finite, not inf"),
    ({"eps": float("inf")}, "eps must be above 0, and finite, not inf"),
    ({"weight_decay": -1.0}, "weight_decay"), ({"warmup": -1}, "warmup must be"),
    ({"momentum": 0.9}, "momentum and nesterov are settings of sgd and muon"),
    ({"optimizer": "muon"}, "muon needs a momentum above 0: give 0.95"),
    ({"optimizer": "sgd", "nesterov": True}, "nesterov"),
    ({"optimizer": "sgd", "momentum": 1.0}, "momentum must be"),
    ({"eps_root": -1e-9}, "eps_root must be 0 or more"), ({"eps_root": float("nan")}, "eps_root must be"),
    ({"optimizer": "sgd", "eps_root": 1e-8}, "eps_root is no setting of sgd"),
    ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0, and finite, or None, not 0.0"),
    ({"max_grad_norm": float("inf")}, "max_grad_norm must be"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(changes, says):
    with pytest.raises(InputError, match=says):
        replace(Training(1, 1, 0.1), **changes)


def test_settings_of_later_fields_are_recorded_where_they_are_used():
    assert {"eps_root", "max_grad_norm"}.isdisjoint(Training(1, 1, 0.1).settings())
    used = Training(1, 1, 0.1, eps_root=1e-8, max_grad_norm=1.0).settings()
    assert (used["eps_root"], used["max_grad_norm"]) == (1e-8, 1.0)
