"""Before anything of gradfn is imported: shapes and types are checked at every call."""

import os

import pytest
import torch
from jaxtyping import install_import_hook

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
install_import_hook("gradfn", "beartype.beartype")
torch.set_num_threads(1)

from gradfn.testing import load_profile  # noqa: E402

load_profile()

collect_ignore_glob = ["*conftest.py"]
"""Several modules of one name cannot be searched for doctests."""


def pytest_configure(config: pytest.Config) -> None:
    """Beartype picks at random which item of a list it checks, which is not a strategy's own randomness."""
    config.addinivalue_line("filterwarnings", "ignore:Do not use the `random` module inside strategies")
