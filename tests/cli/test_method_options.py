"""Methods and their options on the command line, against the library's recipes."""

import json
from dataclasses import replace
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from tiny import QUERIES, make_model, make_tokenizer, mostly_slow, save, write_jsonl

import gradfn as gf
from gradfn.cli.method import SOLVERS
from gradfn.cli.options import Kind
from gradfn.engine.stream import gather
from gradfn.hf import tokenize
from gradfn.methods import RECIPES, Problem
from gradfn.methods.exact_solve import Solver
from gradfn.methods.recipes import group_means
from gradfn.runs.masks import projection_named
from gradfn.subject import Subject
from gradfn.transforms import reseeded
from gradfn.transforms.projection import lenient

TASKS = ("where", "who", "where")
NAMED = [name for name in RECIPES if name not in ("source", "inrun", "magic")]  # which are of a training


def scores_of(run):
    with gf.open_store(run, "scores") as store:
        return np.concatenate([*store.read("scores").swapaxes(0, 1)], 1)


def ids_of(run):
    with gf.open_store(run, "scores") as store:
        return store.index_array("queries/id").tolist()


def words(out):
    """What was printed, in one line: a path may be long, and be wrapped."""
    return " ".join(out.split())


def shown(path, rows=12):
    """The scores of a table that shows all rows but those that score zero, `[rows, queries]`."""
    table = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    names = list(dict.fromkeys(row["query"] for row in table))
    scores = np.zeros((rows, len(names)))
    for row in table:
        scores[row["row"], names.index(row["query"])] = row["score"]
    return scores


def assert_same(got, expected, rtol=1e-4):
    """Equal but for rounding, which is of the size of the largest number."""
    expected = np.asarray(expected)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=1e-5 * np.abs(expected).max())
    assert len(np.unique(expected)) > 1


@pytest.fixture(scope="module")
def other(folder):
    """Another checkpoint of the GPT-NeoX."""
    return save(folder / "neox-1", make_model("neox", seed=1), make_tokenizer(first=False))


@pytest.fixture(scope="module")
def base(neox, corpus):
    return ("--model", neox, "--dataset", corpus)


@pytest.fixture(scope="module")
def tasks(folder):
    """The queries, each of a task."""
    rows = [{**query, "task": task} for query, task in zip(QUERIES, TASKS, strict=True)]
    return write_jsonl(folder / "tasks.jsonl", rows)


@pytest.fixture(scope="module")
def sides(neox, corpus, queries):
    """Training rows and queries, as the commands read them."""
    tokens = gf.load_tokenizer(neox)
    pair = {"prompt_column": "prompt", "completion_column": "completion"}
    return tokenize(gf.load_rows(corpus), tokens), tokenize(gf.load_rows(queries), tokens, **pair)


@pytest.fixture(scope="module")
def problem(sides):
    """`problem(model, recipe, ...)`: what the library is asked."""

    def make(model, name, dim=None, **changes):
        net, recipe = gf.load_model(model), RECIPES[name]
        spelled = recipe.projection if dim is None else f"rademacher:{dim}x{dim}"
        projection = lenient(projection_named(spelled))
        loss = gf.causal_lm_loss(net, criterion=recipe.criterion or "cross_entropy")
        return Problem(Subject(net, loss), *sides, projection=projection, **changes)

    return make


def rows_of(problem, name):
    """Scores and losses of one checkpoint, from the library."""
    method = RECIPES[name].method(problem)
    queries = gf.collect(
        problem.subject.model, problem.query, method.query_transform, loss=problem.subject.loss
    )
    return gather(
        gf.probe_engine(problem.subject.model, problem.subject.loss, method.against(queries)), problem.train
    )


@pytest.fixture(scope="module")
def fitted(ok, folder, base):
    """An EK-FAC curvature on disk."""
    ok("hessian", folder / "ekfac", *base, "--method", "ekfac")
    return folder / "ekfac"


# --- methods by name


@pytest.mark.parametrize("name", mostly_slow(NAMED, "trackstar", "ekfac", "tracin", "datainf"))
def test_every_method_gives_the_scores_of_its_recipe(ok, base, neox, queries, problem, tmp_path, name):
    # One joint matrix is large, and its eigenvectors take long.
    dim = 4 if name == "trak" else None
    flags = () if dim is None else ("--projection-dim", dim)
    if name in SOLVERS["product"]:  # to the end it would take long
        steps, tolerance = (50, 0.5) if name.endswith("cg") else (2, 9.0)
        problem = partial(problem, solver=Solver(iterations=steps, tolerance=tolerance))
        flags = ("--iterations", steps, "--tolerance", tolerance)
    out = ok("score", tmp_path / "run", *base, "--query", queries, "--method", name.replace("_", "-"), *flags)
    assert name in out
    expected = RECIPES[name].combine([rows_of(problem(neox, name, dim), name)], [1.0])
    assert_same(scores_of(tmp_path / "run"), expected)
    assert ids_of(tmp_path / "run") == (["less"] if name == "less" else [query["id"] for query in QUERIES])


def test_a_method_of_your_own(ok, base, neox, queries, problem, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import gradfn as gf\n"
        "from gradfn.methods import Recipe\n"
        "def whitened(problem):\n"
        "    return gf.influence(problem.fit(gf.second_moment()), problem.stage, damping=problem.damping)\n"
        "small = Recipe(whitened, projection='rademacher:4x4')\n"
    )
    method = ("--method", f"{tmp_path}/mine.py:small")
    ok("score", tmp_path / "run", *base, "--query", queries, *method, "--damping", "0.5")
    ok("score", tmp_path / "logra", *base, "--query", queries, "--method", "logra", "--damping", "0.5",
       "--projection-dim", 4)  # fmt: skip
    assert (scores_of(tmp_path / "run") == scores_of(tmp_path / "logra")).all()


# --- dampings


def test_several_dampings_are_the_columns_of_single_runs(ok, base, fitted, queries, tmp_path):
    ask = (*base, "--query", queries, "--hessian-path", fitted, "--projection-dim", 0)
    dampings = ("0.01", "truncated:0.1", "1")
    out = ok("score", tmp_path / "all", *ask, "--damping", ", ".join(dampings), "--show", 9)
    singles = []
    for number, damping in enumerate(dampings):
        run = tmp_path / str(number)
        lines = ok("score", run, *ask, "--damping", damping).splitlines()
        (recall,) = [line.split("ranks")[1].rstrip() for line in lines if line.startswith("gradients ")]
        assert f"damping {damping}: ranks{recall}" in words(out)
        assert words(out).count(f"damping {damping} model loss") == len(QUERIES)
        assert ids_of(run) == [query["id"] for query in QUERIES]
        singles.append(scores_of(run))
    assert_same(scores_of(tmp_path / "all"), np.concatenate(singles, 1))
    assert not np.allclose(singles[0], singles[2])
    swept = gf.Scores.load(tmp_path / "all")
    assert (swept.query_ids, swept.dampings) == ([query["id"] for query in QUERIES], dampings)


# --- checkpoints


def test_checkpoints_are_summed_with_their_weights(ok, base, neox, other, corpus, queries, tmp_path):
    ask, table = ("--query", queries, "--method", "tracin"), ("--top", 12, "--jsonl")
    for name, model in (("a", neox), ("b", other)):
        ok("score", tmp_path / name, "--model", model, "--dataset", corpus, *ask)
    joined = (*base, *ask, "--checkpoints", f"{neox}, {other}", "--checkpoint-weights=-0.5,2")
    expected = -0.5 * scores_of(tmp_path / "a") + 2 * scores_of(tmp_path / "b")
    ok("score", *joined, *table, tmp_path / "t.jsonl")
    assert_same(shown(tmp_path / "t.jsonl"), expected)
    ok("score", tmp_path / "run", *joined)
    assert_same(scores_of(tmp_path / "run"), expected)
    with gf.open_store(tmp_path / "run", "scores") as store:
        parts = store.settings["checkpoints"]
    assert [part["weight"] for part in parts] == [-0.5, 2.0]
    assert [part["path"] for part in parts] == [str(neox.resolve()), str(other.resolve())]
    assert parts[0]["settings"]["model"]["fingerprint"] != parts[1]["settings"]["model"]["fingerprint"]
    assert "12 rows x 3 queries; positive = proponent" in ok("info", tmp_path / "run")


def test_checkpoints_are_resumed_after_the_last_complete_one(ok, base, neox, other, queries, tmp_path):
    run, ask = tmp_path / "run", (*base, "--query", queries, "--checkpoints", f"{neox},{other}")
    ok("score", run, *ask)
    whole = scores_of(run)
    first = {path: path.stat().st_mtime_ns for path in (run / "checkpoint-1").rglob("*.h5")}
    for path in [*(run / "checkpoint-2").rglob("*.h5"), run / "scores.h5", *run.glob("segments/*.h5")]:
        path.unlink()
    out = ok("score", run, *ask)
    assert sum(line.startswith("resumed ") for line in out.splitlines()) == 1
    assert (scores_of(run) == whole).all()
    assert first == {path: path.stat().st_mtime_ns for path in (run / "checkpoint-1").rglob("*.h5")}


def test_trak_over_two_checkpoints(ok, base, neox, other, queries, problem, tmp_path):
    ask = (*base, "--query", queries, "--method", "trak", "--projection-dim", 4,
           "--checkpoints", f"{neox},{other}")  # fmt: skip
    ok("score", tmp_path / "run", *ask)
    parts = [problem(model, "trak", 4) for model in (neox, other)]
    parts[1] = replace(parts[1], projection=reseeded(parts[1].projection, 1))
    both = [rows_of(part, "trak") for part in parts]
    scores = sum(one.values for one in both) / 2
    doubt = sum(one.losses.sigmoid() for one in both) / 2
    assert_same(scores_of(tmp_path / "run"), scores * doubt[:, None])
    ok("score", *ask, "--top", 12, "--jsonl", tmp_path / "t.jsonl")
    assert_same(shown(tmp_path / "t.jsonl"), scores * doubt[:, None])
    seeds = [stage.seed for part in parts for stage in part.projection.stages]
    with gf.open_store(tmp_path / "run", "scores") as store:
        chains = [part["settings"]["transform"]["chain"] for part in store.settings["checkpoints"]]
    assert [stage["seed"] for one in chains for stage in one if "seed" in stage] == seeds
    assert (seeds[0], len({*seeds})) == (0, 2)


def test_a_checkpoint_given_twice_has_one_projection(ok, base, neox, queries, tmp_path):
    ask = (*base, "--query", queries)
    ok("score", tmp_path / "one", *ask)
    ok("score", tmp_path / "twice", *ask, "--checkpoints", f"{neox},{neox}")
    assert_same(scores_of(tmp_path / "twice"), scores_of(tmp_path / "one"))


# --- queries in groups, and rows as their own queries


def cosines(rows, queries):
    rows, queries = (torch.cat([G.flatten(1) for G in side.values()], 1).double() for side in (rows, queries))
    return torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(queries).T


@pytest.mark.parametrize("method", ["less", "grad_cosine"])
def test_queries_of_a_group_are_one(ok, base, neox, sides, tasks, tmp_path, method):
    ask = (*base, "--query", tasks, "--method", method, "--group-column", "task")
    out = ok("score", tmp_path / "run", *ask)
    rows, queries = (gf.collect(gf.load_model(neox), side, gf.project(16)) for side in sides)
    means, names = group_means(queries, TASKS)
    expected = cosines(rows, means)
    assert names == ["where", "who"]
    if method == "less":
        expected, names = expected.amax(1, keepdim=True), ["less"]
    assert_same(scores_of(tmp_path / "run"), expected)
    assert ids_of(tmp_path / "run") == names
    assert ("the best of 2 queries" if method == "less" else "mean of 2 queries") in out


@pytest.mark.parametrize("by", ["example", "token"])
@pytest.mark.parametrize("method", ["grad_dot", "ekfac"])
def test_the_influence_of_rows_on_themselves(ok, base, neox, sides, fitted, tmp_path, method, by):
    ask = (*base, "--self", "--method", method, "--projection-dim", 0, "--by", by)
    out = ok("score", tmp_path / "run", *ask)
    assert "self-influence" in out
    grads = gf.collect(gf.load_model(neox), sides[0], view=gf.View(tokens=by == "token"))
    H = gf.precondition(gf.runs.load_curvature(fitted)) if method == "ekfac" else gf.chain()
    expected = sum((H(grads)[name] * G).flatten(1).sum(1) for name, G in grads.items())
    assert_same(scores_of(tmp_path / "run"), expected[:, None])
    assert (scores_of(tmp_path / "run") >= 0).all()
    assert ids_of(tmp_path / "run") == ["self-influence"]
    ok("score", *ask, "--top", len(expected), "--jsonl", tmp_path / "t.jsonl")
    assert_same(shown(tmp_path / "t.jsonl", len(expected)), expected[:, None])


# --- what curvatures are fitted with


def test_labels_are_drawn_from_the_model_with_the_seed(ok, base, neox, sides, problem, queries, tmp_path):
    net, labels = gf.load_model(neox), ("--labels", "model", "--seed", 3)
    ok("hessian", tmp_path / "H", *base, "--method", "kfac", *labels)
    drawn = gf.statistics.sample_labels(gf.causal_lm_loss(net), sides[0], 3)
    expected, data = gf.fit(gf.kfac(), net, drawn), gf.fit(gf.kfac(), net, sides[0])
    found = gf.runs.load_curvature(tmp_path / "H")
    for name, one in expected.items():
        torch.testing.assert_close(found[name].values, one.values)
        assert not torch.allclose(data[name].values, one.values)
    ok("score", tmp_path / "run", *base, "--query", queries, "--method", "kfac", *labels)
    asked = problem(neox, "kfac", labels="model", seed=3)
    assert_same(scores_of(tmp_path / "run"), rows_of(asked, "kfac").values)


@pytest.mark.parametrize("kind", mostly_slow(get_args(Kind), "kfac"))
def test_curvatures_of_every_kind_are_those_of_the_library(ok, base, neox, sides, tmp_path, kind):
    dim = 0 if kind != "second_moment" else 16
    out = ok("hessian", tmp_path / "H", *base, "--method", kind.replace("_", "-"))
    assert f"{kind}, 8 blocks, 12 rows" in words(out)
    expected = gf.fit(getattr(gf, kind)(), gf.load_model(neox), sides[0], gf.project(dim))
    found = gf.runs.load_curvature(tmp_path / "H")
    assert (found.kind, found.rows, list(found)) == (kind, 12, list(expected))
    for name, one in expected.items():
        torch.testing.assert_close(found[name].values, one.values)
        torch.testing.assert_close(found[name].right, one.right)
    told = ok("info", tmp_path / "H" / "hessian.h5")
    assert f"{kind}, 8 blocks, 12 rows" in words(told)
    assert ok("info", tmp_path / "H") == told


def test_partitions_change_nothing(ok, base, fitted, tmp_path):
    ok("hessian", tmp_path / "H", *base, "--method", "ekfac", "--partitions", 2)
    assert gf.runs.load_curvature(tmp_path / "H").digest == gf.runs.load_curvature(fitted).digest


def test_a_mixed_curvature(ok, base, neox, queries, tmp_path):
    pair = ("--prompt-column", "prompt", "--completion-column", "completion")
    ok("hessian", tmp_path / "train", *base)
    ok("hessian", tmp_path / "query", "--model", neox, "--dataset", queries, *pair)
    ends = (tmp_path / "query", tmp_path / "train")
    H_query, H_train = map(gf.runs.load_curvature, ends)

    out = ok("mix", tmp_path / "quarter", *ends, "--coefficient", 0.25)
    assert "0.25 of the queries', 0.75 of the training rows'" in out
    for name, one in gf.runs.load_curvature(tmp_path / "quarter").items():
        expected = 0.25 * H_query[name].dense() + 0.75 * H_train[name].dense()
        torch.testing.assert_close(one.dense(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))

    out = ok("mix", tmp_path / "mixed", *ends, "--target_downweight_components", 5)
    coefficient = gf.statistics.mixing_coefficient(H_query, H_train, 5)
    assert f"{coefficient:.4g} of the queries'" in out
    with gf.open_store(tmp_path / "mixed", "hessian") as store:
        assert store.settings["hessian"]["coefficient"] == coefficient
    assert "hessian.coefficient" in ok("info", tmp_path / "mixed")
    assert "already" not in ok("mix", tmp_path / "mixed", *ends, "--target_downweight_components", 5)

    ask = (*base, "--query", queries, "--method", "trackstar")
    ok("score", tmp_path / "given", *ask, "--hessian-path", tmp_path / "mixed")
    ok("score", tmp_path / "fitted", *ask, "--target-downweight-components", 5)
    assert_same(scores_of(tmp_path / "given"), scores_of(tmp_path / "fitted"))


ATTRIBUTIONS = """
import gradfn as gf
from gradfn.types import Rows


class Lengths:
    damping = (None,)

    def scorer(self, subject, query, *, by_block=False):
        if query is None:
            raise ValueError("no queries")

        def score(train, rows=None, *, progress=None):
            rows = range(len(train)) if rows is None else rows
            some = [len(train[row]["input_ids"]) * 1.0 for row in rows]
            values = next(subject.model.parameters()).new_tensor(some)
            return Rows(values[:, None].expand(-1, len(query)), values)

        return score

    def settings(self):
        return {"of": "lengths"}


def lengths(problem):
    return Lengths()


class Late(Lengths):
    def scorer(self, subject, query, *, by_block=False):
        return lambda train, rows=None, *, progress=None: {}["x"]


def late(problem):
    return Late()


def twice(problem):
    parts = [(None, gf.grad_dot(problem.stage)), (None, gf.grad_dot(problem.stage))]
    return gf.methods.Joined(parts, weights=[1.0, 2.0])
"""


def test_anything_that_yields_scores_is_a_method(ok, command, base, corpus, queries, tmp_path):
    recipe = tmp_path / "own.py"
    recipe.write_text(ATTRIBUTIONS)
    ask = (*base, "--query", queries, "--projection-dim", 0)
    ok("score", tmp_path / "plain", *ask, "--method", "grad_dot")
    for name in ("lengths", "twice"):
        own = (*ask, "--method", f"{recipe}:{name}")
        ok("score", tmp_path / name, *own)
        ok("score", *own, "--top", 12, "--jsonl", tmp_path / f"{name}.jsonl")
        assert_same(shown(tmp_path / f"{name}.jsonl"), scores_of(tmp_path / name))
    assert_same(scores_of(tmp_path / "twice"), 3 * scores_of(tmp_path / "plain"))
    with gf.open_store(tmp_path / "lengths", "scores") as scores:
        assert scores_of(tmp_path / "lengths")[:, 1].tolist() == scores.read("rows/length").tolist()
        assert scores.settings["method"]["of"] == "lengths"
    grouped = ("--query", queries, "--group-column", "completion")
    for name, asked, words in (
        ("lengths", ("--self",), "lengths failed (ValueError: no queries): mend it"),
        ("lengths", grouped, "takes queries and not their gradients, which --group-column is of"),
        ("late", ("--query", queries), "late failed (KeyError: 'x'): mend it"),
    ):
        result = command("score", *base, *asked, "--projection-dim", 0, "--method", f"{recipe}:{name}")
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert words in result.err
