import struct
from itertools import pairwise

import pytest

from gradfn.errors import InputError, StorageError
from gradfn.evaluate.bootstrap import Estimate
from gradfn.report import plots
from gradfn.report.plots import Point, plot_lds, plot_runs, spread

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


def test_labels_are_kept_apart_in_their_order():
    placed = spread([0.5, 0.1, 0.51, 0.52], 0.1)
    assert placed[1] == pytest.approx(0.1)
    assert [placed[0], placed[2], placed[3]] == pytest.approx([0.41, 0.51, 0.61])
    chained = spread([0.0, 0.06, 0.2], 0.1)
    assert [b - a >= 0.1 - 1e-9 for a, b in pairwise(chained)] == [True, True]


def test_what_cannot_be_plotted_is_refused_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match=r"cannot plot to .*lds.txt: give a name that ends in .png, .pdf or .svg"
    ):
        plot_lds(POINTS, tmp_path / "lds.txt")
    with pytest.raises(InputError, match="0 points to plot"):
        plot_lds([], tmp_path / "lds.png")
    with pytest.raises(InputError, match="need a positive x"):
        plot_lds([Point("one", 0, 0.1, 0.0, 0.2)], tmp_path / "lds.png")
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"plots need matplotlib, which is not here: pip install 'gradfn\[plot\]'"
    ):
        plot_runs(RUNS, tmp_path / "runs.png")
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(StorageError, match=r"could not write .*lds.png: No such file"):
        plot_lds(POINTS, tmp_path / "gone" / "lds.png")
