"""Plots of evaluations, by matplotlib (`pip install matplotlib`), which loads with the first plot."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import combinations, pairwise
from math import copysign, isfinite
from pathlib import Path
from typing import Any, NamedTuple

from gradfn.errors import InputError, StorageError
from gradfn.evaluate.bootstrap import Estimate
from gradfn.evaluate.change import Changes, agreement
from gradfn.report.words import clean

FORMATS = ("png", "pdf", "svg")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
"""The palette of Okabe and Ito, whose colours differ for people with any kind of colour vision."""
MARKERS = "osD^vPX"
INK, FAINT, GRID, BAND = "#262626", "#6B6B6B", "#E6E6E6", "#EFEBE0"
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.labelcolor": FAINT, "axes.edgecolor": "#BFBFBF", "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "xtick.color": FAINT, "ytick.color": FAINT, "text.color": INK,
    "xtick.major.size": 3, "ytick.major.size": 3, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "svg.hashsalt": "gradfn", "pdf.fonttype": 42,
}  # fmt: skip
DPI = 200
LABEL_GAP, LABEL_ASIDE = 11.0, 6.0
"""Distances between the middles of labels above each other, and from a marker to its label, in points."""
MARKER = 2.5
"""Half the width of a marker, in points."""
ROUNDS = 400
"""How often labels are moved apart: enough for a dozen at one place."""
DODGE = 0.006
"""The distance between intervals of lines at one x, as a share of the axis."""
FEWEST_BARS = 4
"""The fewest bars for which there is room, so that a single bar is not too wide."""
LABEL_ROOM = 0.35
"""The room for the name of the ceiling below the lowest bar, in bars."""


class Point(NamedTuple):
    """One measurement of a method: its LDS with the ends of its interval, at a dimension, time or damping."""

    name: str
    x: float
    lds: float
    low: float
    high: float


def check_plot(path: str | Path) -> None:
    """Refuse, before any work, a plot that could not be made.

    Raises:
        InputError: an unknown ending, or matplotlib is not installed.

    >>> check_plot("lds.jpg")
    Traceback (most recent call last):
    ...
    gradfn.errors.InputError: cannot plot to lds.jpg: give a name that ends in .png, .pdf or .svg
    """
    if Path(path).suffix.lower().removeprefix(".") not in FORMATS:
        raise InputError(f"cannot plot to {path}: give a name that ends in .png, .pdf or .svg")
    if find_spec("matplotlib") is None:
        raise InputError("plots need matplotlib, which is not installed: pip install matplotlib")


def plot_lds(
    points: Sequence[Point],
    path: str | Path,
    *,
    ceiling: Estimate | None = None,
    x_label: str = "projection dimension",
    title: str = "Linear datamodeling score",
) -> Path:
    """Draw LDS against projection dimension, time a row, damping or any positive number, a line a method.

    Args:
        points: measurements in any order; those of one name make a line.
        path: a .png, .pdf or .svg.
        ceiling: the noise ceiling, drawn as a band.
        x_label: what x is, with its unit; the axis is logarithmic.
        title: above the plot.

    Returns:
        The path.

    Raises:
        InputError: see `check_plot`; no points, an x that is not positive, or numbers that are not finite.

    >>> import tempfile
    >>> points = [Point("SJLT", k, 0.4 + k / 1e5, 0.39 + k / 1e5, 0.41 + k / 1e5) for k in (1024, 4096)]
    >>> plot_lds(points, tempfile.mkdtemp() + "/lds.png", ceiling=Estimate(0.6, 0.58, 0.61)).name
    'lds.png'
    """
    if not points or any(point.x <= 0 for point in points):
        raise InputError(f"{len(points)} points to plot: give at least one, and to each a positive x")
    for point in points:
        if not all(map(isfinite, point[1:])):
            raise InputError(f"{point} has a number that is not finite: leave it out")
    with _figure(path, 1, (6.4, 4.0)) as (axis,):
        colours = dict(zip(_by_name(points), _colours(len(points)), strict=False))
        ends = _lines(axis, points, colours)
        _band(axis, ceiling, vertical=False)
        _log_ticks(axis, sorted({float(point.x) for point in points}))
        axis.set_xlabel(clean(x_label), parse_math=False)
        axis.set_title(clean(title), parse_math=False)
        _limits(axis, points, ceiling)
        _end_labels(axis, ends, colours)
    return Path(path)


def plot_runs(
    runs: Mapping[str, Estimate],
    path: str | Path,
    *,
    ceiling: Estimate | None = None,
    dampings: Mapping[str, Mapping[str, Estimate]] | None = None,
    chosen: Mapping[str, str] | None = None,
    title: str = "Linear datamodeling score",
) -> Path:
    """Draw a bar a run with its interval, and beside them LDS against damping where there are several.

    Args:
        runs: the LDS of each run, drawn in this order from the top.
        path: a .png, .pdf or .svg.
        ceiling: the noise ceiling, drawn as a band.
        dampings: of runs with several, the LDS of each damping by its name.
        chosen: the damping that a run is reported at, which is filled in.
        title: above the plot.

    Returns:
        The path.

    Raises:
        InputError: see `check_plot`; a run whose numbers are not finite; dampings of no run.

    >>> import tempfile
    >>> runs = {"ekfac": Estimate(0.40, 0.36, 0.44), "grad_dot": Estimate(0.23, 0.19, 0.27)}
    >>> plot_runs(runs, tempfile.mkdtemp() + "/runs.png", ceiling=Estimate(0.89, 0.88, 0.90)).name
    'runs.png'
    """
    for name, one in runs.items():
        if not all(map(isfinite, one)):
            raise InputError(f"{name} has a number that is not finite, {one}: leave it out")
    if unknown := sorted({*(dampings or {})} - {*runs}):
        raise InputError(f"there are dampings of {unknown[0]}, but no run of that name: leave them out")
    panels = 2 if dampings else 1
    height = max(1.7, 1.05 + 0.36 * len(runs)) if panels == 1 else max(3.2, 1.05 + 0.36 * len(runs))
    with _figure(path, panels, (6.4 if panels == 1 else 10.4, height)) as axes:
        colours = dict(zip(runs, _colours(len(runs)), strict=True))
        _bars(axes[0], runs, ceiling, colours)
        axes[0].set_title(clean(title), parse_math=False)
        if dampings:
            _damping_panel(axes[1], dampings, chosen or {}, ceiling, colours)
    return Path(path)


def plot_changes(parts: Mapping[str, Sequence[Changes]], path: str | Path, *, unit: str = "") -> Path:
    """Draw real changes of losses against predicted ones, a panel a size of steps, a colour a run.

    Args:
        parts: the changes of each run, one of each size.
        path: a .png, .pdf or .svg.
        unit: of the losses.

    Returns:
        The path.

    Raises:
        InputError: see `check_plot`; nothing to draw.

    >>> import tempfile, torch
    >>> made = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    >>> one = Changes(torch.full((4,), 0.1).double(), made, made + made.square() / 9, True)
    >>> plot_changes({"magic": [one]}, tempfile.mkdtemp() + "/changes.png", unit="nats").name
    'changes.png'
    """
    sizes = sorted({float(one.size[0]) for found in parts.values() for one in found})
    if not sizes:
        raise InputError("there are no changes to draw: give at least one run with one size of steps")
    with _figure(path, len(sizes), (0.4 + 4.0 * len(sizes), 4.2)) as axes:
        colours = dict(zip(parts, _colours(len(parts)), strict=True))
        for axis, size in zip(axes, sizes, strict=True):
            there = {
                name: one for name, found in parts.items() for one in found if float(one.size[0]) == size
            }
            _scatter(axis, f"step {size:.3g}", there, colours)
            suffix = f" ({unit})" if unit else ""
            axis.set(xlabel=f"predicted change of a query's loss{suffix}", ylabel=f"real change{suffix}")
    return Path(path)


# --- parts


def _scatter(axis: Any, title: str, found: Mapping[str, Changes], colours: Mapping[str, str]) -> None:
    """Points beside the diagonal; the figures of one run in the title, of several in the legend."""
    axis.grid(color=GRID, linewidth=0.8)
    for name, change in found.items():
        told = agreement(change)
        figures = f": slope {told.slope.value:.2f}, correlation {told.correlation.value:.3f}"
        x, y = (side.flatten().tolist() for side in (change.predicted, change.real))
        alone = len(found) == 1
        axis.scatter(x, y, s=10, alpha=0.5, color=colours[name], linewidths=0, rasterized=True,
                     label=clean(name) if alone else clean(name) + figures)  # fmt: skip
        title += figures if alone else ""
    low, high = _ends([change.predicted for change in found.values()])
    axis.plot([low, high], [low, high], color=INK, linewidth=1.2, linestyle=(0, (4, 2)), label="as predicted")
    axis.set_title(title)
    axis.locator_params(axis="x", nbins=6)
    for text in axis.legend(frameon=False, fontsize=8, handletextpad=0.4).get_texts():
        text.set_parse_math(False)


def _ends(values: Sequence[Any]) -> tuple[float, float]:
    """The smallest and the largest of all numbers."""
    return min(float(one.min()) for one in values), max(float(one.max()) for one in values)


@contextmanager
def _figure(path: str | Path, panels: int, size: tuple[float, float]) -> Iterator[Sequence[Any]]:
    """Axes of a figure, which is written as a whole when the context ends without an error."""
    check_plot(path)
    import matplotlib
    from matplotlib.figure import Figure

    path = Path(path)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            figure.savefig(partial, dpi=DPI, format=path.suffix.lower().removeprefix("."))
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise StorageError(error.errno, f"could not write {path}: {error.strerror or error}") from error


def _colours(count: int) -> list[str]:
    """A colour a run: the palette, then darker and lighter, so that up to 21 runs differ.

    >>> len(set(_colours(21)))
    21
    """
    toward = {0: (0.0, 0.0), 1: (0.45, 0.0), 2: (0.5, 1.0)}
    made = []
    for number in range(count):
        again, at = divmod(number, len(COLOURS))
        share, grey = toward[again % len(toward)]
        parts = [int(COLOURS[at][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        made.append("#" + "".join(f"{round(255 * (p + share * (grey - p))):02X}" for p in parts))
    return made


def _bars(
    axis: Any, runs: Mapping[str, Estimate], ceiling: Estimate | None, colours: Mapping[str, str]
) -> None:
    """Horizontal bars from the top, each with its interval and its number."""
    ends = [one.high for one in runs.values()] + ([ceiling.high] if ceiling else [])
    starts = [one.low for one in runs.values()]
    right, left = max([*ends, 0.05]), min([*starts, 0.0])
    for row, (name, one) in enumerate(runs.items()):
        axis.barh(row, one.value, height=0.62, color=colours[name], alpha=0.9, linewidth=0)
        axis.plot([one.low, one.high], [row, row], color=INK, linewidth=1.3, solid_capstyle="butt")
        end = max(one.high, 0.0) + 0.012 * (right - left)
        axis.text(end, row, f"{one.value:.2f}", va="center", ha="left", fontsize=9, zorder=4)
    _band(axis, ceiling, vertical=True)
    axis.set_yticks(range(len(runs)), [*map(clean, runs)], color=INK, parse_math=False)
    axis.tick_params(axis="y", length=0)
    room = max(len(runs), FEWEST_BARS) / 2 + 0.05
    below = LABEL_ROOM if ceiling and len(runs) >= FEWEST_BARS else 0.0
    axis.set_ylim((len(runs) - 1) / 2 + room + below, (len(runs) - 1) / 2 - room)
    axis.set_xlim(left * 1.08, right + 0.12 * (right - left))
    axis.axvline(0, color="#BFBFBF", linewidth=0.8)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    axis.set_xlabel("LDS, mean over queries with 95 % interval")


def _band(axis: Any, ceiling: Estimate | None, *, vertical: bool) -> None:
    """The noise ceiling with its interval and its label."""
    if ceiling is None:
        return
    span, line = (axis.axvspan, axis.axvline) if vertical else (axis.axhspan, axis.axhline)
    span(ceiling.low, ceiling.high, color=BAND, zorder=0, linewidth=0)
    line(ceiling.value, color="#A89F80", linewidth=1, linestyle=(0, (4, 2)), zorder=0.5)
    label = f"noise ceiling {ceiling.value:.2f}"
    if vertical:
        where = {
            "xy": (ceiling.value, 0),
            "xycoords": ("data", "axes fraction"),
            "xytext": (-6, 4),
            "ha": "right",
        }
    else:
        where = {"xy": (0, ceiling.high), "xycoords": ("axes fraction", "data"), "xytext": (4, 2)}
    axis.annotate(label, textcoords="offset points", color="#7A7150", fontsize=8, zorder=4, **where)


def _by_name(points: Sequence[Point]) -> dict[str, list[Point]]:
    lines: dict[str, list[Point]] = {}
    for point in points:
        lines.setdefault(point.name, []).append(point)
    return {name: sorted(line, key=lambda point: point.x) for name, line in lines.items()}


def _lines(axis: Any, points: Sequence[Point], colours: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """A line a name, with a thin bar for each interval, beside each other at one x; their last markers."""
    axis.set_xscale("log")
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    span = max(p.x for p in points) / min(p.x for p in points)
    lines, ends = _by_name(points), {}
    for number, (name, line) in enumerate(lines.items()):
        places = {p.x for p in line}
        there = [other for other in lines if places & {p.x for p in lines[other]}]
        # Only where lines meet: a single point stands at its own x.
        aside = span ** (DODGE * (there.index(name) - (len(there) - 1) / 2))
        x, colour = [p.x * aside for p in line], colours[name]
        marker = MARKERS[(number + number // len(MARKERS)) % len(MARKERS)]
        axis.vlines(x, [p.low for p in line], [p.high for p in line], color=colour, linewidth=1.2, alpha=0.5)
        axis.plot(x, [p.lds for p in line], color=colour, marker=marker, markersize=4.5, linewidth=1.6,
                  markeredgewidth=0)  # fmt: skip
        ends[name] = x[-1], line[-1].lds
    axis.set_ylabel("LDS, mean over queries with 95 % interval")
    return ends


def _log_ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks at the values themselves where they are few and apart; 1, 2, 5, 10 otherwise."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if len(values) <= 8 and all(b / a >= 1.4 for a, b in pairwise(values)):
        axis.set_xticks(values, [_number(value) for value in values])
    else:
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    axis.xaxis.set_minor_locator(NullLocator())


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _limits(axis: Any, points: Sequence[Point], ceiling: Estimate | None) -> None:
    """All intervals and the ceiling, with some room."""
    top = max([point.high for point in points] + ([ceiling.high] if ceiling else []))
    bottom = min(point.low for point in points)
    room = 0.09 * max(top - bottom, 0.05)
    axis.set_ylim(bottom - room, top + room)


def _end_labels(axis: Any, ends: Mapping[str, tuple[float, float]], colours: Mapping[str, str]) -> None:
    """The names of lines beside their last markers, moved up or down where they would lie on one another."""
    from matplotlib.text import Text  # an annotation's own extent has its leader in it

    leader = {
        "relpos": (0, 0.5),
        "arrowstyle": "-",
        "alpha": 0.5,
        "linewidth": 0.8,
        "shrinkA": 1,
        "shrinkB": 3,
    }
    labels = [
        axis.annotate(
            clean(name), at, xytext=(LABEL_ASIDE, 0), textcoords="offset points", color=colours[name],
            va="center", fontsize=9, annotation_clip=False, arrowprops={**leader, "color": colours[name]},
            zorder=5, parse_math=False,
        )
        for name, at in ends.items()
    ]  # fmt: skip
    axis.figure.draw_without_rendering()  # lays the axes out, on which it depends what overlaps
    points = 72 / axis.figure.dpi
    boxes = [Text.get_window_extent(label).extents * points for label in labels]
    boxes = [Label(left, right, (bottom + top) / 2) for left, bottom, right, top in boxes]
    markers = [
        Label(x - MARKER, x + MARKER, y) for x, y in axis.transData.transform([*ends.values()]) * points
    ]
    for label, box, height in zip(labels, boxes, apart(boxes, LABEL_GAP, markers), strict=True):
        label.xyann = (LABEL_ASIDE, height - box.height)
        label.arrow_patch.set_visible(abs(height - box.height) > LABEL_GAP / 2)


class Label(NamedTuple):
    """The ends of a label along x, and its height, in points."""

    left: float
    right: float
    height: float


def apart(labels: Sequence[Label], gap: float, markers: Sequence[Label] = ()) -> list[float]:
    """Heights at which no two labels that share a piece of the x axis are closer than `gap`, in their order.

    Pairs that are too close move each other by halves, until none is; a label also keeps off markers, by
    three quarters of the gap, where there is room.

    >>> apart([Label(0, 9, 5.0), Label(4, 12, 5.0), Label(20, 30, 5.0)], 2.0)
    [4.0, 6.0, 5.0]
    """
    heights = [label.height for label in labels]
    order = sorted(range(len(labels)), key=lambda number: heights[number])
    pairs = [(a, b) for a, b in combinations(order, 2)
             if labels[a].left < labels[b].right and labels[b].left < labels[a].right]  # fmt: skip
    near = [
        (a, one)
        for a in order
        for one in markers
        if labels[a].left < one.right and one.left < labels[a].right
    ]
    for turn in range(ROUNDS):
        for a, one in near if turn < ROUNDS // 2 else ():
            aside = heights[a] - one.height
            heights[a] += copysign(max(0.75 * gap - abs(aside), 0.0), aside)
        for a, b in pairs:
            lack = max(gap - (heights[b] - heights[a]), 0.0)
            heights[a], heights[b] = heights[a] - lack / 2, heights[b] + lack / 2
    return heights


def _damping_panel(
    axis: Any, dampings: Mapping[str, Mapping[str, Estimate]], chosen: Mapping[str, str],
    ceiling: Estimate | None, colours: Mapping[str, str],
) -> None:  # fmt: skip
    """LDS against damping; numbers on a logarithmic axis, other dampings side by side in their order."""
    names = list(dict.fromkeys(name for curve in dampings.values() for name in curve))
    numeric = all(_is_positive(name) for name in names)
    places = {name: float(name) if numeric else float(number) for number, name in enumerate(names)}
    points = [
        Point(run, places[name], *one) for run, curve in dampings.items() for name, one in curve.items()
    ]
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    ends: dict[str, tuple[float, float]] = {}
    for run, line in _by_name(points).items():
        colour = colours[run]
        x, y = [p.x for p in line], [p.lds for p in line]
        axis.fill_between(
            x, [p.low for p in line], [p.high for p in line], color=colour, alpha=0.12, linewidth=0
        )
        axis.plot(x, y, color=colour, marker="o", markersize=4.5, linewidth=1.6, markerfacecolor="white")
        at = [p for p in line if run in chosen and p.x == places[chosen[run]]]
        axis.plot([p.x for p in at], [p.lds for p in at], color=colour, marker="o", markersize=6.5)
        ends[run] = line[-1].x, line[-1].lds
    _band(axis, ceiling, vertical=False)
    _limits(axis, points, ceiling)
    if numeric:
        axis.set_xscale("log")
        _log_ticks(axis, sorted(places.values()))
    else:
        axis.set_xticks(list(places.values()), names, parse_math=False)
    axis.set(xlabel="damping (filled: chosen on other queries)", title="LDS against damping")
    _end_labels(axis, ends, colours)


def _is_positive(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False
