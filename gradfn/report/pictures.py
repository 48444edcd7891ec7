"""What the charts of a page draw, as plain numbers and paths: templates write the SVG."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from gradfn.evaluate.change import Changes

BINS = 48
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
LEVELS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-"
"""63 letters for numbers from -31 to 31."""
SHADES = 8
WIDTH, HEIGHT = 100.0, 24.0
POINTS = 1500
"""Of a scatter plot; more cannot be told apart."""


@dataclass(frozen=True)
class Histogram:
    """How many of a query's scores lie where.

    Args:
        low, high: the ends; 0 is between them.
        levels: the height of every bin as a digit of base 36; the square root of its count, so that few
            rows can be seen beside many.

    >>> Histogram.of(np.array([0.0, 0.0, 0.0, 0.0, 1.0])).levels.replace("0", "")
    'zi'
    """

    low: float
    high: float
    levels: str

    @classmethod
    def of(cls, scores: Float[np.ndarray, " rows"]) -> "Histogram":
        """That of scores, of which there is at least one."""
        low, high = min(0.0, float(scores.min())), max(0.0, float(scores.max()))
        high = high if high > low else low + 1
        counts, _ = np.histogram(scores, BINS, (low, high))
        heights = np.ceil(35 * np.sqrt(counts / counts.max())).astype(int)
        return cls(low, high, "".join(DIGITS[height] for height in heights))

    def x(self, score: float) -> float:
        """Where a score lies, from 0 to 100."""
        return round(WIDTH * (score - self.low) / (self.high - self.low), 2)

    @property
    def path(self) -> str:
        """The outline, in a box of 100 x 24."""
        step = WIDTH / BINS
        heights = (HEIGHT * (1 - DIGITS.index(digit) / 35) for digit in self.levels)
        return f"M0 {HEIGHT:g}" + "".join(f"V{y:.3g}h{step:.4g}" for y in heights) + f"V{HEIGHT:g}z"


# --- where a score comes from


@dataclass(frozen=True)
class Grid:
    """The layers and columns of a heat map, and the cell that each block belongs to.

    Attention heads are columns of their own. Projections with the same number of heads share them: head 3 of
    a layer is head 3 of its query, key, value and output projection. Others (MLPs) are columns by name.

    Args:
        layers: the names of the rows.
        columns: the names of the columns.
        places: the row and column of every block, which may share a cell.
    """

    layers: Sequence[str]
    columns: Sequence[str]
    places: Mapping[str, tuple[int, int]]

    def cells(self, shares: Mapping[str, float]) -> Float[np.ndarray, "layers columns"]:
        """The sum of the shares of the blocks in every cell."""
        made = np.zeros((len(self.layers), len(self.columns)))
        for block, share in shares.items():
            made[self.places[block]] += share
        return made


def grid_of(blocks: Iterable[str]) -> Grid:
    """The heat map of blocks, by their names.

    >>> grid = grid_of(["h.0.q[0]", "h.0.q[1]", "h.0.k[0]", "h.0.k[1]", "h.0.mlp.up", "h.1.mlp.up"])
    >>> grid.layers, grid.columns, grid.places["h.0.k[1]"]
    (['0', '1'], ['head 0', 'head 1', 'mlp.up'], (0, 1))
    """
    parts = {block: _parts(block) for block in blocks}
    heads: dict[str, set[str]] = {}
    for _, module, head in parts.values():
        if head:
            heads.setdefault(module, set()).add(head)
    groups: dict[int, list[str]] = {}
    for module, named in heads.items():
        groups.setdefault(len(named), []).append(module.rpartition(".")[2])

    def column(module: str, head: str) -> str:
        if not head:
            return module
        alike = groups[len(heads[module])]
        return f"head {head}" if len(groups) == 1 else f"{', '.join(dict.fromkeys(alike))} {head}"

    layers = sorted({layer for layer, _, _ in parts.values()}, key=lambda name: (len(name), name))
    named = dict.fromkeys(column(module, head) for _, module, head in parts.values() if head)
    named |= dict.fromkeys(module for _, module, head in parts.values() if not head)
    columns = [*named]
    places = {
        block: (layers.index(layer), columns.index(column(module, head)))
        for block, (layer, module, head) in parts.items()
    }
    return Grid(layers, columns, places)


def _parts(block: str) -> tuple[str, str, str]:
    """The number of the layer, the module inside the layer and the head, of a block's name.

    >>> _parts("model.layers.10.self_attn.q_proj[3]"), _parts("fc")
    (('10', 'self_attn.q_proj', '3'), ('', 'fc', ''))
    """
    name, head = re.fullmatch(r"(.*?)(?:\[([\d.]+)\])?", block, re.DOTALL).groups()  # pyright: ignore
    inner = re.fullmatch(r"(?:.*?\.)?(\d+)\.(.*)", name, re.DOTALL)
    return (inner[1], inner[2], head or "") if inner else ("", name, head or "")


def shades(cells: Float[np.ndarray, "layers columns"]) -> list[tuple[str, int, str]]:
    """Squares of one colour as one path: `(side, shade from 1 to 8, path)`, in units of cells.

    >>> shades(np.array([[1.0, -0.5], [0.0, 1.0]]))
    [('con', 4, 'M1 0h1v1h-1z'), ('pro', 8, 'M0 0h1v1h-1zM1 1h1v1h-1z')]
    """
    most = float(np.abs(cells).max(initial=0)) or 1.0
    made: dict[tuple[str, int], str] = {}
    for y, x in np.ndindex(*cells.shape):
        if shade := int(np.ceil(SHADES * abs(cells[y, x]) / most - 1e-9)):
            key = ("pro" if cells[y, x] > 0 else "con", shade)
            made[key] = made.get(key, "") + f"M{x} {y}h1v1h-1z"
    return [(side, shade, path) for (side, shade), path in sorted(made.items())]


def as_letters(cells: Float[np.ndarray, "layers columns"]) -> str:
    """Cells as letters, each a number from -31 to 31 of the largest in size.

    >>> as_letters(np.array([[1.0, -1.0], [0.0, 0.5]]))
    '-0Vl'
    """
    most = float(np.abs(cells).max(initial=0)) or 1.0
    return "".join(LEVELS[31 + round(31 * float(cell) / most)] for cell in cells.flat)


# --- lines and points


class Line(NamedTuple):
    """A row's line: its number, its side and the points of the polyline, in a box of 100 x 24."""

    row: int
    side: str
    points: str


class Lines(NamedTuple):
    """How scores grew, their ends, and the names of the ends of the x axis."""

    lines: Sequence[Line]
    low: float
    high: float
    first: str
    last: str


def lines_of(series: Mapping[int, Sequence[tuple[float, float]]], first: str, last: str) -> Lines:
    """Lines of running sums, from 0.

    Args:
        series: of every row what is added, and when, in order: `(x, addend)`.
        first, last: the names of the ends of the x axis.

    >>> lines_of({7: [(1.0, 2.0), (2.0, -1.0)]}, "start", "end").lines
    [Line(row=7, side='pro', points='0,24 50,0 100,12')]
    """
    sums = {row: np.cumsum([0.0, *(y for _, y in added)]) for row, added in series.items()}
    last_x = max((x for added in series.values() for x, _ in added), default=1.0)
    low = min((float(y.min()) for y in sums.values()), default=0.0)
    high = max((float(y.max()) for y in sums.values()), default=0.0)
    scale = (high - low) or 1.0
    made = []
    for row, added in series.items():
        xs = [0.0, *(x for x, _ in added), last_x]
        ys = [*sums[row].tolist(), float(sums[row][-1])]
        places = dict.fromkeys(
            f"{WIDTH * x / last_x:.4g},{HEIGHT * (1 - (y - low) / scale):.4g}"
            for x, y in zip(xs, ys, strict=True)
        )
        made.append(Line(row, "pro" if ys[-1] >= 0 else "con", " ".join(places)))
    return Lines(made, low, high, first, last)


class Scatter(NamedTuple):
    """Predicted (x) and real (y) changes in a box of 100 x 100, whose middle is 0.

    Args:
        name: of the run and damping.
        points: places, one a model and query.
        reach: the change that the edges of the box stand for.
        slope, correlation: of the line through 0, and Pearson's, in words.
        total: how many points there are, of which at most 1,500 are drawn.
    """

    name: str
    points: Sequence[tuple[float, float]]
    reach: float
    slope: str
    correlation: str
    total: int


def scatter_of(name: str, found: Changes, slope: str, correlation: str) -> Scatter:
    """The points of predicted and real changes; of very many, evenly chosen ones."""
    predicted, real = found.predicted.flatten().numpy(), found.real.flatten().numpy()
    reach = float(max(np.abs(predicted).max(initial=0), np.abs(real).max(initial=0))) or 1.0
    chosen = np.unique(np.linspace(0, len(real) - 1, min(len(real), POINTS)).round().astype(int))
    points = [
        (round(50 + 48 * float(predicted[i]) / reach, 2), round(50 - 48 * float(real[i]) / reach, 2))
        for i in chosen
    ]
    return Scatter(name, points, reach, slope, correlation, len(real))
