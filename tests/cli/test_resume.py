"""What a run is taken up with again: nothing that was made otherwise, and all that was made alike."""

import shutil

import numpy as np
import pytest
from tiny import CAPITALS, DOCUMENTS, QUERIES, make_model, make_tokenizer, save, write_jsonl

import gradfn as gf

ASK = ("--query", "The capital of Peru is", "--completion", " Lima")
SEVERAL = """
import gradfn as gf


def two(problem):
    unit = problem.fit(gf.second_moment(), transform=gf.chain(problem.stage, gf.unit_normalize()))
    plain = problem.fit(gf.second_moment())
    return gf.influence(plain if WHICH else unit, problem.stage, damping=problem.damping)
"""


@pytest.fixture(scope="module")
def base(neox, corpus):
    return ("--model", neox, "--dataset", corpus)


@pytest.fixture
def otherwise(command):
    """Run a command that must be refused for what the run was made with."""

    def run(words, *arguments):
        result = command(*arguments)
        assert (result.status, result.err.count("\n")) == (2, 1), result.err
        assert words in result.err
        assert "add --overwrite to replace it, or write to another directory" in result.err

    return run


def scores_of(run):
    with gf.open_store(run, "scores") as store:
        return store.read("scores")[:, 0]


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.h5")}


# --- what differs is refused, and replaced where that is asked for


@pytest.mark.parametrize(("first", "second", "words"), [
    (("--damping", 10), ("--damping", 0.1), "method.solve.damping is 10.0 there and 0.1 here"),
    ((), ("--labels", "model"), 'method.solve.labels is "data" there and "model" here'),
    (("--labels", "model"), ("--labels", "model", "--seed", 1), "method.solve.seed is 0 there and 1 here"),
])  # fmt: skip
def test_what_datainf_solved_with(ok, otherwise, base, tmp_path, first, second, words):
    ask = (*base, *ASK, "--method", "datainf", "--projection-dim", 4)
    ok("score", tmp_path / "run", *ask, *first)
    before = scores_of(tmp_path / "run")
    otherwise(words, "score", tmp_path / "run", *ask, *second)
    assert (scores_of(tmp_path / "run") == before).all()
    ok("score", tmp_path / "run", *ask, *second, "--overwrite")
    ok("score", tmp_path / "new", *ask, *second)
    assert (scores_of(tmp_path / "run") == scores_of(tmp_path / "new")).all()
    assert not np.allclose(scores_of(tmp_path / "new"), before)


def test_the_groups_of_queries(command, ok, otherwise, base, tmp_path):
    def grouped(groups):
        rows = [{**query, "task": group} for query, group in zip(QUERIES, groups, strict=True)]
        return write_jsonl(tmp_path / "q.jsonl", rows)

    def ask(*shard):
        return ("score", tmp_path / "run", *base, "--query", tmp_path / "q.jsonl", "--group-column", "task",
                *shard)  # fmt: skip

    grouped("abb")
    ok(*ask())
    grouped("aba")
    otherwise("query.groups_fingerprint is", *ask())
    shutil.rmtree(tmp_path / "run")
    for number, groups in ((1, "abb"), (2, "aba")):
        grouped(groups)
        ok(*ask("--shard", f"{number}/2"))
    result = command("merge", tmp_path / "run")
    assert result.status == 2
    assert "were made differently (query.groups_fingerprint is" in result.err


def test_the_file_of_a_recipe(ok, otherwise, base, tmp_path):
    mine = tmp_path / "mine.py"
    solved = (
        "from gradfn.methods import InnerProduct\n"
        "def solved(problem):\n"
        "    both = problem.stage, problem.stage\n"
        "    return InnerProduct(*both, solve=lambda q: {n: TIMES * v for n, v in q.items()})\n"
    )
    ask = ("score", tmp_path / "run", *base, *ASK, "--method", f"{mine}:solved")
    mine.write_text(solved.replace("TIMES", "1.0"))
    ok(*ask)
    assert "from 12 rows that were there already" in ok(*ask)
    otherwise('method.dampings.0 is "0.1" there and "0.5" here', *ask, "--damping", 0.5)
    before = scores_of(tmp_path / "run")
    mine.write_text(solved.replace("TIMES", "-5.0"))
    otherwise("method.file is", *ask)
    ok(*ask, "--overwrite")
    np.testing.assert_allclose(scores_of(tmp_path / "run"), -5 * before, rtol=1e-5)


def test_a_query_side_that_a_recipe_has_from_elsewhere(ok, otherwise, base, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import os\nimport gradfn as gf\n"
        "def sides(problem):\n"
        "    unit = [gf.unit_normalize()] if os.environ['UNIT'] == '1' else []\n"
        "    return gf.methods.InnerProduct(problem.stage, gf.chain(problem.stage, *unit))\n"
    )
    ask = ("score", tmp_path / "run", *base, *ASK, "--method", f"{tmp_path}/mine.py:sides")
    monkeypatch.setenv("UNIT", "1")
    ok(*ask)
    monkeypatch.setenv("UNIT", "0")
    otherwise("method.query is", *ask)


# --- ids have a digest of their own


@pytest.fixture
def renamed(tmp_path):
    """`renamed(prefix)` writes the same rows and queries under other ids."""

    def write(prefix):
        rows = [{"id": f"{prefix}{i}", "text": row["text"]} for i, row in enumerate(DOCUMENTS)]
        asked = [{**query, "id": f"{prefix}{query['id']}"} for query in QUERIES]
        return write_jsonl(tmp_path / "d.jsonl", rows), write_jsonl(tmp_path / "q.jsonl", asked)

    return write


@pytest.mark.parametrize(
    ("command_name", "flags"), [("score", ()), ("build", ()), ("build", ("--by", "token"))]
)
def test_rows_under_other_ids(ok, otherwise, neox, renamed, tmp_path, command_name, flags):
    kind = "scores" if command_name == "score" else "store"

    def ids():
        with gf.open_store(tmp_path / "run", kind) as store:
            return store.index_array("documents/id") if flags else store.read("rows/id")

    data, _ = renamed("a")
    asked = ASK if command_name == "score" else ()
    ask = (command_name, tmp_path / "run", "--model", neox, "--dataset", data, *asked, *flags)
    ok(*ask)
    before = times(tmp_path / "run")
    renamed("b")
    otherwise("data.ids is", *ask)
    assert times(tmp_path / "run") == before
    ok(*ask, "--overwrite")
    assert ids().tolist() == [f"b{i}" for i in range(len(DOCUMENTS))]
    assert "resumed" in ok(*ask)


@pytest.mark.parametrize(
    "flags", [("score", *ASK), ("score", *ASK, "--by", "token"), ("build", "--by", "token")]
)
def test_rows_of_an_unfinished_run_under_other_ids(ok, otherwise, neox, renamed, tmp_path, flags):
    data, _ = renamed("a")
    name, *more = flags
    ask = (name, tmp_path / "run", "--model", neox, "--dataset", data, *more, "--token-batch-size", 1)
    ok(*ask)
    next((tmp_path / "run").glob("*.h5")).unlink()
    sorted((tmp_path / "run" / "segments").glob("*.h5"))[-1].unlink()
    renamed("b")
    otherwise("data.ids is", *ask)


def test_shards_under_other_ids(command, ok, neox, renamed, tmp_path):
    for number, prefix in ((1, "a"), (2, "b")):
        data, _ = renamed(prefix)
        ok("build", tmp_path / "run", "--model", neox, "--dataset", data, "--shard", f"{number}/2")
    result = command("merge", tmp_path / "run")
    assert result.status == 2
    assert "were made differently (data.ids is" in result.err


def test_queries_under_other_ids(ok, otherwise, base, renamed, tmp_path):
    _, queries = renamed("a")
    ask = ("score", tmp_path / "run", *base, "--query", queries)
    ok(*ask)
    renamed("b")
    otherwise("query.ids is", *ask)


def test_retrained_models_under_other_ids(ok, otherwise, model, renamed, tmp_path):
    data, queries = renamed("a")
    ask = ("retrain", tmp_path / "truth", "--model", model, "--dataset", data, "--query", queries,
           "--subsets", 3, "--seeds", 1, "--epochs", 1, "--batch-size", 3)  # fmt: skip
    ok(*ask)
    renamed("b")
    otherwise('rows/id 0 is "a0" there and "b0" here', *ask)


# --- what was made alike stays, where --overwrite is there for a table


def test_overwriting_a_table_keeps_the_scores(ok, base, tmp_path):
    ask = ("score", tmp_path / "run", *base, *ASK, "--method", "logra", "--csv", tmp_path / "t.csv")
    ok(*ask)
    before = times(tmp_path / "run")
    table = (tmp_path / "t.csv").read_text()
    (tmp_path / "t.csv").write_text("old")
    assert "from 12 rows that were there already" in ok(*ask, "--overwrite")
    assert times(tmp_path / "run") == before
    assert (tmp_path / "t.csv").read_text() == table
    assert "resumed" not in ok(*ask, "--overwrite", "--damping", 0.5)
    assert "damping" not in ok("info", tmp_path / "run" / "hessian.h5")  # which is the same for all dampings


def test_overwriting_a_table_keeps_what_shards_and_checkpoints_made(ok, base, neox, tmp_path):
    other = save(tmp_path / "other", make_model("neox", seed=1), make_tokenizer(first=False))
    ask = ("score", tmp_path / "run", *base, *ASK, "--checkpoints", f"{neox},{other}")
    for number in (1, 2):
        ok(*ask, "--shard", f"{number}/2")
    ok("merge", tmp_path / "run")
    before = times(tmp_path / "run")
    assert "from 24 rows that were there already" in ok(*ask, "--overwrite", "--csv", tmp_path / "t.csv")
    assert times(tmp_path / "run") == before
    ok("merge", tmp_path / "run")


# --- recipes that fit several curvatures


def test_two_curvatures_are_kept_apart(ok, base, tmp_path):
    both = {}
    for which in (True, False):
        mine = tmp_path / f"mine{which}.py"
        mine.write_text(SEVERAL.replace("WHICH", str(which)))
        ask, run = (*base, *ASK, "--method", f"{mine}:two"), tmp_path / str(which)
        ok("score", run, *ask)
        kept = times(run)
        assert "resumed" in ok("score", run, *ask)
        assert times(run) == kept
        both[which] = scores_of(run)
        assert gf.runs.load_curvature(run).digest != gf.runs.load_curvature(run / "hessian-2").digest
    ok("score", tmp_path / "logra", *base, *ASK, "--method", "logra", "--projection", "rademacher:16x16")
    np.testing.assert_allclose(both[True], scores_of(tmp_path / "logra"), rtol=1e-4)
    assert not np.allclose(both[False], both[True])


# --- the path of a store is told as it was given


def test_paths_are_told_as_they_were_given(ok, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ok("build", "facts", *base)
    assert f"store   facts/store.h5 [{len(CAPITALS)} rows]" in ok("query", "facts", *ASK)
    assert "store   facts/store.h5 [" in ok("query", "facts/store.h5", *ASK)
    for given in ("facts", "facts/store.h5"):
        (line,) = [line.split() for line in ok("info", given).splitlines() if line.startswith("file ")]
        assert line == ["file", "facts/store.h5"]
