"""Packages that gradfn has bridges to, where they are installed."""

import warnings

import pytest


def imported(*names):
    """Modules of a package, whose own warnings are no faults; the test is skipped where it is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [pytest.importorskip(name) for name in names]
