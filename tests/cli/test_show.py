import csv
import io
import json
import re
import time

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress
from tiny import write_jsonl

from gradfn.cli.options import TableOptions
from gradfn.errors import InputError, StorageError
from gradfn.report.exports import WRITERS, export_ranking
from gradfn.report.progress import _columns, _Work, progress_bar
from gradfn.report.summaries import unprobed_facts
from gradfn.report.tables import Piped, excerpt, facts, ranking
from gradfn.report.words import clean
from gradfn.shown import SAID
from gradfn.watch import WATCH, Resumed, watched

HOSTILE = (
    "[red]x[/red] \x1b[31mred\x1b[0m \x9b2J bell\x07\ttab\r\nnext\u2028line \u202eright\u200b [/bold] :smile:"
)
HOSTILE_SEEN = "[red]x[/red] [31mred[0m 2J bell tab next line right [/bold] :smile:"


def row(score=1.5, **changes):
    made = {"query": "0", "side": "proponent", "rank": 1, "score": score, "row": 3, "id": "a", "text": "b"}
    return {**made, **changes}


def printed(table, width=100, terminal=False):
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, emoji=False, force_terminal=terminal).print(table)
    return out.getvalue()


def test_clean_leaves_one_line_of_printable_text():
    assert clean(HOSTILE) == HOSTILE_SEEN
    assert clean("\udc80a") == "a"
    assert clean("Grüße, 世界 → ✓") == "Grüße, 世界 → ✓"


@pytest.mark.parametrize(("width", "seen"), [(5, "abcde"), (4, "abc…"), (1, "…")])
def test_clean_cuts_at_the_width(width, seen):
    assert clean("abcde", width) == seen


def test_facts_show_what_is_there_and_nothing_else():
    seen = printed(facts([(HOSTILE, HOSTILE)]), width=200)
    assert HOSTILE_SEEN in seen
    assert seen.count("\n") == 1


def test_facts_keep_room_for_the_value_beside_a_long_name():
    first = printed(facts([("query " + "q" * 500, "the value " * 3)])).splitlines()[0]
    assert first.startswith("query qqq")
    assert "the value the value the value" in first


def test_ranking_shows_text_as_it_is():
    seen = printed(ranking([row(id="[i]\x1b[2J", text=HOSTILE)], 120), width=120)
    assert "[i][2J" in seen
    assert "[red]x[/red] [31mred[0m" in seen
    assert "\x1b" not in seen


@pytest.mark.parametrize("name", ["a", "i" * 500, "名" * 80])
@pytest.mark.parametrize("text", ["t " * 500, "世界" * 200])
def test_ranking_is_one_line_a_row_that_uses_the_width(name, text):
    lines = printed(
        ranking([row(id=name, text=text), row(-2e-10, side="opponent", rank=2)], 100)
    ).splitlines()
    assert len(lines) == 2
    assert "…" in lines[0]
    assert len(lines[0].rstrip()) > (85 if text.isascii() and name.isascii() else 50)
    assert lines[0].split()[:3] == ["proponent", "1", "+1.5"]
    assert lines[1].split()[:3] == ["opponent", "2", "-2e-10"]


@pytest.mark.parametrize("width", [36, 40, 50, 60, 70, 80])
@pytest.mark.parametrize("name", ["a", "i" * 500, "名" * 80])
def test_in_a_narrow_terminal_names_and_texts_make_room_for_scores(width, name):
    rows = [row(id=name, text="t " * 500), row(-2.345e-10, side="opponent", rank=2, id="other")]
    lines = printed(ranking(rows, width), width).splitlines()
    assert len(lines) == 2
    assert lines[0].split()[:3] == ["proponent", "1", "+1.5"]
    assert lines[1].split()[:3] == ["opponent", "2", "-2.345e-10"]
    assert lines[0].split()[3][0] == name[0]


def test_without_a_width_ids_and_texts_are_whole_and_on_one_line():
    out = io.StringIO()
    rows = [row(id="i" * 99, text="two\nlines\t" * 99), row(text=f"Who?{SAID}Ann", shares=[("mlp", 0.5)])]
    Piped(file=out, width=40, highlight=False).print(ranking(rows, None))
    first, second, share = out.getvalue().splitlines()
    assert first.endswith(f"{'i' * 99}  " + r"two\nlines\t" * 99)
    assert second.split() == ["proponent", "1", "+1.5", "a", "Who?", "→", "Ann"]
    assert share.split() == ["+0.5", "mlp"]
    assert not re.search(r" $", out.getvalue(), re.MULTILINE)


def test_of_a_text_that_is_supervised_in_part_the_border_is_shown():
    text = f"system: Be kind and brief.\nuser: Who wrote it?{SAID}Ann wrote all of it, and more."
    assert (
        excerpt(text, 200)
        == "system: Be kind and brief. user: Who wrote it? → Ann wrote all of it, and more."
    )
    assert excerpt(text, 40) == "…er: Who wrote it? → Ann wrote all of i…"
    assert excerpt(f"a very long prompt{SAID}yes", 17) == "…ong prompt → yes"
    assert [cell_len(excerpt(text, width)) for width in range(60)] == list(range(60))
    assert excerpt("plain → text", 9) == "plain → …"


def test_proponents_are_green_and_opponents_red():
    seen = printed(ranking([row(), row(-1.5)], 100), terminal=True)
    assert "\x1b[32m+1.5" in seen
    assert "\x1b[31m-1.5" in seen


ROWS = [row(0.1 + 0.2, text=HOSTILE), row(-1e-30, side="opponent", id='quo"te,', row=7)]


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {**r, "rank": int(r["rank"]), "score": float(r["score"]), "row": int(r["row"])}
            for r in csv.DictReader(file)
        ]


def read_parquet(path):
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize("rows", [ROWS, []])
def test_exports_read_back_as_what_was_written(tmp_path, rows):
    paths = [tmp_path / name for name in ("t.csv", "t.jsonl", "t.parquet")]
    export_ranking(rows, dict(zip(("csv", "jsonl", "parquet"), paths, strict=True)))
    for path, read in zip(paths, (read_csv, read_jsonl, read_parquet), strict=True):
        assert read(path) == rows
    assert sorted(tmp_path.iterdir()) == sorted(paths)


@pytest.mark.parametrize(
    "text", ['=HYPERLINK("http://x")', "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", " -x"]
)
def test_a_csv_has_no_formulas(tmp_path, text):
    paths = {kind: tmp_path / f"t.{kind}" for kind in ("csv", "jsonl")}
    export_ranking([row(score=-1.5, id=text, text=text, query=text), row(id="-5", text="a=b")], paths)
    with paths["csv"].open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert {first[name] for name in ("id", "text", "query")} == {f"'{text}"}
    assert (first["score"], second["id"], second["text"]) == ("-1.5", "-5", "a=b")
    assert json.loads(paths["jsonl"].read_text().splitlines()[0])["text"] == text


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    old = tmp_path / "t.csv"
    old.write_text("old")

    def fail(rows, columns, path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(WRITERS, "csv", fail)
    with pytest.raises(StorageError, match=r"could not write .*t.csv: No space left"):
        export_ranking(ROWS, {"csv": old})
    assert old.read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]


def test_check_exports(tmp_path):
    there = write_jsonl(tmp_path / "there.csv", [{}])
    TableOptions(jsonl=tmp_path / "new.csv").check(overwrite=False)
    TableOptions(csv=there).check(overwrite=True)
    with pytest.raises(InputError, match="exists: give another name, or --overwrite"):
        TableOptions(csv=there).check(overwrite=False)
    for path in (tmp_path, tmp_path / "no" / "t.csv"):
        with pytest.raises(InputError, match="give a file in a folder that exists"):
            TableOptions(csv=path).check(overwrite=True)
    with pytest.raises(InputError, match="two exports have the same path"):
        TableOptions(csv=tmp_path / "a", parquet=tmp_path / "a").check(overwrite=True)


@pytest.fixture
def clock(monkeypatch):
    """Sets the time that progress sees; lines come at once, and then a hundred times a second."""
    now = [0.0]
    monkeypatch.setattr("gradfn.report.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr("gradfn.report.progress._SHOWN", [])
    monkeypatch.setattr("gradfn.report.progress.FIRST_AFTER_S", 0.01)
    monkeypatch.setattr("gradfn.report.progress.PLAIN_EVERY_S", 0.01)
    monkeypatch.setattr("gradfn.report.progress.QUIET_BELOW_S", 2.0)
    return lambda seconds: now.__setitem__(0, float(seconds))


@pytest.fixture
def line(capsys, clock):
    """The next whole line of progress."""

    def read():
        capsys.readouterr()
        seen, end = "", time.perf_counter() + 20
        while seen.count("\n") < 2:  # the first may have been made before
            assert time.perf_counter() < end, "no line of progress came"
            seen += capsys.readouterr().err
        return seen.splitlines()[1]

    return read


def test_progress_without_a_terminal_is_silent_when_short(capsys, monkeypatch):
    monkeypatch.setattr("gradfn.report.progress.QUIET_BELOW_S", 2.0)
    with progress_bar("gradients", 10) as progress:
        progress(10)
    assert capsys.readouterr() == ("", "")


def test_lines_say_what_is_done_and_left_and_what_comes_after(capsys, clock, line):
    with progress_bar("curvature", 400, then="scores", longest=90) as progress:
        clock(5)
        assert line() == "curvature: 0 of 400 tokens, 5 s, rows of up to 90 tokens, then scores"
        for done, seconds in ((50, 6.0), (50, 12.0)):
            clock(seconds)
            progress(done)
        assert line() == "curvature: 25%, 12 s, about 36 s left, then scores"
        clock(26.0)
        progress(300)
    assert capsys.readouterr().err.splitlines()[-1] == "curvature: 400 tokens in 26.0 s"


def test_the_time_left_of_a_resumed_run_is_that_of_the_new_rows(clock, line):
    with progress_bar("gradients", 400) as progress:
        clock(30)  # the names of many rows are compared first
        progress(Resumed(300))
        clock(50)
        assert line() == "gradients: 300 of 400 tokens, 50 s"
        progress(20)
        assert line() == "gradients: 80%, 50 s, about 80 s left"


def test_work_inside_has_lines_of_its_own_and_counts_for_no_speed(clock, line):
    token = WATCH.set(progress_bar)
    with progress_bar("curvature", 100) as progress:
        clock(10)
        progress(50)
        for number in watched("decompositions", range(3), "blocks", timed=False):
            clock(10 + 100 * number)
            assert line() == f"decompositions: {number} of 3 blocks, {100 * number} s"
        assert line() == "curvature: 50%, 210 s, about 10 s left"
        clock(215)
        progress(25)
        assert line() == "curvature: 75%, 215 s, about 5 s left"
    with progress_bar("reading rows.jsonl"):
        clock(220)
        assert line() == "reading rows.jsonl: 5 s"
    WATCH.reset(token)


@pytest.mark.parametrize("width", [30, 40, 50, 79, 80, 100, 120, 160])
def test_a_bar_keeps_the_share_and_the_time_left_at_every_width(clock, width):
    work = _Work("query gradients", 117_659_000, then="decompositions and scores", start=0.0)
    bar = Progress(*_columns(width), console=Console(width=width, file=io.StringIO()), get_time=lambda: 0.0)
    task = bar.add_task(work.label, total=work.total, work=work)
    inner = _Work("decompositions", 24, "blocks", timed=False)
    bar.add_task(inner.label, total=24, work=inner)
    assert "eta -:--:--" in printed(bar.get_renderable(), width)
    work.add(29_414_750, 30.0)
    bar.advance(task, 29_414_750)
    first, second = printed(bar.get_renderable(), width).splitlines()
    assert " 25% " in first
    assert "eta 0:01:30" in first
    assert ("then decompositions and scores" in first) == (width >= 79)
    assert "eta" not in second


def test_a_terminal_has_a_bar_for_the_work_and_one_for_what_is_inside(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(
        "gradfn.report.progress.Console", lambda stderr: Console(stderr=True, force_terminal=True, width=90)
    )
    with progress_bar("curvature", 4) as progress:
        progress(2)
        with progress_bar("decompositions", 3, "blocks", timed=False) as inside:
            inside(1)
            assert [task.description for task in progress.bar.tasks] == ["curvature", "decompositions"]
        assert [task.completed for task in progress.bar.tasks] == [2]
    assert "decompositions" in capsys.readouterr().err


def test_layers_that_no_probe_sees_are_told():
    assert unprobed_facts([]) == []
    assert unprobed_facts(["a"]) == [("note", "no probe sees a: through vmap(grad), which is slower")]
    ((_, told),) = unprobed_facts(["a", "b", "c", "d", "e"])
    assert told == "no probe sees a, b, c and 2 more: through vmap(grad), which is slower"
