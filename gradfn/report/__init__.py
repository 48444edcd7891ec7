"""What a person looks at."""

from gradfn.report.plots import Point, plot_lds

__all__ = [
    "Point",
    "plot_lds",
]
