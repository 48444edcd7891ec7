"""How hard Hypothesis tries: quick and repeatable for every change, long and random for the night."""

import os

from hypothesis import HealthCheck, Phase, settings

SLOW_TO_DRAW = (HealthCheck.too_slow, HealthCheck.data_too_large)


def load_profile() -> str:
    """Register the profiles and load the one that the environment names in `HYPOTHESIS_PROFILE`.

    Returns:
        Its name: "default" (few examples, always the same, not shrunk) or "nightly" (many, random).

    >>> load_profile() in ("default", "nightly")
    True
    """
    common = {"deadline": None, "suppress_health_check": SLOW_TO_DRAW}
    quick = {"max_examples": 10, "phases": (Phase.explicit, Phase.generate)}  # shrinking takes minutes
    settings.register_profile("default", derandomize=True, database=None, **quick, **common)
    settings.register_profile("nightly", max_examples=200, derandomize=False, print_blob=True, **common)
    name = os.environ.get("HYPOTHESIS_PROFILE", "default")
    settings.load_profile(name)
    return name
