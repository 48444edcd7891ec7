"""nnsight: the module in a wrapper."""

from typing import Any

from torch import nn

from gradfn.errors import InputError


def module(wrapper: Any) -> nn.Module:
    """The module that an `NNsight`, a `LanguageModel` or an envoy of a part of one is around.

    gradfn's names are those of this module: what nnsight calls `model.transformer.h.0.mlp.c_fc` is the block
    `transformer.h.0.mlp.c_fc`. Nothing that was edited in the wrapper is in it.

    Raises:
        InputError: what is around no module.

    >>> from types import SimpleNamespace
    >>> module(SimpleNamespace(_module=nn.Linear(2, 1)))
    Linear(in_features=2, out_features=1, bias=True)
    """
    for name in ("_module", "_model"):  # what versions to 0.8 and before 0.3 call it
        found = getattr(wrapper, name, None)
        if isinstance(found, nn.Module):
            return found
    raise InputError(f"a {type(wrapper).__name__} is around no torch module: give an nnsight.NNsight")
