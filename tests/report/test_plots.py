import math
import struct
from itertools import combinations, pairwise

import pytest
import torch
from matplotlib.text import Text

from gradfn.errors import InputError, StorageError
from gradfn.evaluate.bootstrap import Estimate
from gradfn.evaluate.change import Changes
from gradfn.report import plots
from gradfn.report.plots import Label, Point, apart, plot_changes, plot_lds, plot_runs

POINTS = [Point(name, k, y + k / 4e4, y + k / 4e4 - 0.02, y + k / 4e4 + 0.03)
          for name, y in (("GraSS", 0.3), ("SJLT", 0.31)) for k in (512, 2048, 8192)]  # fmt: skip
RUNS = {"ekfac": Estimate(0.40, 0.36, 0.44), "random": Estimate(-0.02, -0.06, 0.03)}
CEILING = Estimate(0.89, 0.88, 0.90)
CURVES = {"ekfac": {"1": RUNS["random"], "0.1": RUNS["ekfac"]}}


def size_of_png(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:])


def words_of(path):
    """The texts of an SVG, which matplotlib notes beside their outlines."""
    return [
        line.split("<!-- ")[1].split(" -->")[0] for line in path.read_text().splitlines() if "<!-- " in line
    ]


def test_a_png_has_200_dots_an_inch(tmp_path):
    path = plot_lds(POINTS, tmp_path / "lds.png", ceiling=CEILING)
    assert size_of_png(path) == (6.4 * 200, 4.0 * 200)
    assert [file.name for file in tmp_path.iterdir()] == ["lds.png"]


def test_lines_are_labelled_directly_and_ticks_are_the_dimensions(tmp_path):
    words = words_of(plot_lds(POINTS, tmp_path / "lds.svg", ceiling=CEILING, x_label="k", title="A title"))
    for text in ("GraSS", "SJLT", "512", "2,048", "8,192", "k", "A title", "noise ceiling 0.89"):
        assert text in words


def test_a_time_axis_has_round_ticks(tmp_path):
    points = [Point(f"m{n}", 0.8 * 1.17**n, 0.2, 0.1, 0.3) for n in range(14)]
    words = words_of(plot_lds(points, tmp_path / "time.svg", x_label="ms a row"))
    assert {"1", "2", "5"} <= {*words}
    assert "noise" not in " ".join(words)


def test_bars_have_names_and_numbers(tmp_path):
    words = words_of(plot_runs(RUNS, tmp_path / "runs.svg", ceiling=CEILING, title="A title"))
    for text in ("ekfac", "random", "0.40", "-0.02", "noise ceiling 0.89", "A title"):
        assert text in words
    assert "LDS against damping" not in words


@pytest.mark.parametrize(("dampings", "ticks"), [
    (CURVES, ("0.1", "1")),
    ({"ekfac": {"1": RUNS["random"], "truncated:1e-06": RUNS["ekfac"]}}, ("1", "truncated:1e-06")),
])  # fmt: skip
def test_several_dampings_get_a_panel(tmp_path, dampings, ticks):
    chosen = {"ekfac": [*dampings["ekfac"]][-1], "random": ""}
    path = plot_runs(RUNS, tmp_path / "runs.svg", ceiling=CEILING, dampings=dampings, chosen=chosen)
    words = words_of(path)
    assert {"LDS against damping", *ticks} <= {*words}
    assert words.count("ekfac") == 2
    assert words.count("random") == 1


@pytest.mark.parametrize("count", [1, 3, 4, 30])
def test_the_name_of_the_ceiling_lies_on_no_bar(tmp_path, monkeypatch, count):
    seen, bars = [], plots._bars
    monkeypatch.setattr(plots, "_bars", lambda axis, *given: (seen.append(axis), bars(axis, *given)))
    runs = {str(n): Estimate(0.86, 0.8, 0.9) for n in range(count)}
    plot_runs(runs, tmp_path / "runs.png", ceiling=CEILING)
    (axis,) = seen
    axis.figure.draw_without_rendering()
    (label,) = (text for text in axis.texts if "ceiling" in text.get_text())
    lowest = min(bar.get_window_extent().y0 for (bar,) in axis.containers)
    assert Text.get_window_extent(label).y1 < lowest


def test_labels_are_kept_apart_in_their_order():
    placed = apart([Label(0.0, 30.0, height) for height in (50.0, 10.0, 51.0, 52.0)], 10.0)
    assert placed == pytest.approx([41, 10, 51, 61], abs=1e-6)
    chained = apart([Label(9.0 * n, 9.0 * n + 10, height) for n, height in enumerate((0.0, 6.0, 5.0))], 10.0)
    assert chained[1] - chained[0] >= 10 - 1e-6
    assert chained[1] - chained[2] >= 10 - 1e-6
    assert abs(chained[2] - chained[0]) < 5
    many = apart([Label(0.0, 30.0, 0.0)] * 12, 10.0)
    assert min(b - a for a, b in pairwise(many)) >= 10 - 1e-3


def test_every_label_stands_at_one_distance_from_its_marker(tmp_path, monkeypatch):
    """Twelve methods of a point each, some at one place, and two at one x."""
    seen = {}

    def kept(axis, ends, colours):
        original(axis, ends, colours)
        seen.update(axis=axis, ends=ends)

    original = plots._end_labels
    monkeypatch.setattr(plots, "_end_labels", kept)
    xs = [1.0, 1.1, 1.2, 3.0, 3.0, 9.0, 20.0, 21.0, 40.0, 90.0, 91.0, 92.0]
    points = [Point(f"method {n}", x, 0.3 + 0.01 * (n % 3), 0.2, 0.5) for n, x in enumerate(xs)]
    plot_lds(points, tmp_path / "time.png", x_label="seconds")
    axis, boxes = seen["axis"], []
    axis.figure.draw_without_rendering()
    for label in axis.texts:
        box, marker = Text.get_window_extent(label), axis.transData.transform(seen["ends"][label.get_text()])
        assert (box.x0 - marker[0]) * 72 / axis.figure.dpi == pytest.approx(6, abs=0.5)
        boxes.append(box)
    for a, b in combinations(boxes, 2):
        assert not (a.x0 < b.x1 and b.x0 < a.x1 and a.y0 + 1 < b.y1 and b.y0 + 1 < a.y1)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_names_are_no_formulas(tmp_path, ending):
    name = r"a$\foo$_$x"
    estimate = RUNS["ekfac"]
    runs = plot_runs({name: estimate}, tmp_path / f"runs.{ending}", dampings={name: {r"$\bar$": estimate}})
    lines = plot_lds([Point(name, 2, 0.1, 0.0, 0.2)], tmp_path / f"lds.{ending}")
    assert ending == "png" or (name in words_of(runs) and name in words_of(lines))


def test_what_cannot_be_plotted_is_refused_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match=r"cannot plot to .*lds.txt: give a name that ends in .png, .pdf or .svg"
    ):
        plot_lds(POINTS, tmp_path / "lds.txt")
    with pytest.raises(InputError, match="0 points to plot"):
        plot_lds([], tmp_path / "lds.png")
    with pytest.raises(InputError, match="to each a positive x"):
        plot_lds([Point("one", 0, 0.1, 0.0, 0.2)], tmp_path / "lds.png")
    for wrong in ((math.nan, 0.1), (math.inf, 0.1), (2, math.nan), (2, -math.inf)):
        with pytest.raises(InputError, match=r"^Point\(name='one'.* has a number that is not finite"):
            plot_lds([Point("one", *wrong, 0.0, 0.2)], tmp_path / "lds.png")
    with pytest.raises(
        InputError, match=r"^there are dampings of two, but no run of that name: leave them out$"
    ):
        plot_runs({"one": Estimate(0.1, 0.0, 0.2)}, tmp_path / "lds.png", dampings={"two": {}})
    with pytest.raises(
        InputError, match=r"^one has a number that is not finite, Estimate\(.*: leave it out$"
    ):
        plot_runs({"one": Estimate(0.1, math.nan, math.nan)}, tmp_path / "runs.png")
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"plots need matplotlib, which is not installed: pip install matplotlib"
    ):
        plot_runs(RUNS, tmp_path / "runs.png")
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(StorageError, match=r"could not write .*lds.png: No such file"):
        plot_lds(POINTS, tmp_path / "gone" / "lds.png")


def test_changes_have_a_panel_a_size_and_figures_of_each_run(tmp_path):
    p = torch.arange(6.0).reshape(2, 3).double()
    small, large = (Changes(torch.full((2,), size).double(), p, p * size * 20, True) for size in (0.05, 0.1))
    drawn = words_of(plot_changes({"a $x run": [large, small]}, tmp_path / "one.svg", unit="nats"))
    for text in ("step 0.05: slope 1.00, correlation 1.000", "step 0.1: slope 2.00, correlation 1.000",
                 "predicted change of a query's loss (nats)", "a $x run", "as predicted"):  # fmt: skip
        assert text in drawn
    assert drawn.index("step 0.05: slope 1.00, correlation 1.000") < drawn.index(
        "step 0.1: slope 2.00, correlation 1.000"
    )
    both = {"a": [small], "b": [large._replace(size=small.size)]}
    two = words_of(plot_changes(both, tmp_path / "two.svg"))
    for text in ("a: slope 1.00, correlation 1.000", "b: slope 2.00, correlation 1.000", "real change"):
        assert text in two
    with pytest.raises(InputError, match="no changes to draw"):
        plot_changes({}, tmp_path / "none.svg")
