"""Scores as tests compare them: one matrix, or one a block."""

import gradfn as gf


def score(*args, **options):
    """`gf.score`, as `[rows, dampings * queries]`, or with `by_block` as `{block: the same}`."""
    scores = gf.score(*args, **options)
    if scores.shares:
        return {name: share.movedim(0, 1).flatten(1) for name, share in scores.shares.items()}
    return scores.values.movedim(0, 1).flatten(1)
