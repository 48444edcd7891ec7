import csv
import json

import h5py
import numpy as np
import pyarrow.parquet
import pytest
import torch
from tiny import CAPITALS, DOCUMENTS, QUERIES, make_model, make_tokenizer, write_jsonl
from torch.utils._python_dispatch import TorchDispatchMode

import gradfn as gf
from gradfn import example
from gradfn.model.sites import find_sites

RATE = 1e-4  # small, but the norms inside work in float32
ASK = ("--query", "The capital of Peru is", "--completion", " Lima")


def scores_of(run):
    with h5py.File(run / "scores.h5") as file:
        assert file["scores"].dtype == np.float32
        return file["scores"][:, 0]


def table_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def base(model, corpus):
    return ("--model", model, "--dataset", corpus)


@pytest.fixture(scope="module")
def run(ok, folder, base, queries):
    """Scores of all queries, and the table of all rows."""
    path = folder / "scored"
    ok("score", path, *base, "--query", queries, "--top", 12, "--jsonl", folder / "table.jsonl")
    return path


def test_scores_are_those_of_the_library(run, model, corpus, queries):
    net, tokens = gf.load_model(model), gf.load_tokenizer(model)
    train = gf.tokenize(gf.load_rows(corpus), tokens)
    asked = gf.tokenize(gf.load_rows(queries), tokens, prompt_column="prompt", completion_column="completion")
    expected = gf.score(net, train, asked, method=gf.grad_dot(gf.project(16))).matrix
    np.testing.assert_allclose(scores_of(run), expected.numpy(), rtol=1e-4, atol=1e-4)
    assert scores_of(run).shape == (len(DOCUMENTS), len(QUERIES))


def test_the_table_ranks_the_scores_and_splits_them_by_sign(run, folder):
    scores, table = scores_of(run), table_of(folder / "table.jsonl")
    for number, query in enumerate(QUERIES):
        rows = [row for row in table if row["query"] == query["id"]]
        column = scores[:, number]
        up = [int(i) for i in np.argsort(-column, kind="stable") if column[i] > 0]
        down = [int(i) for i in np.argsort(column, kind="stable") if column[i] < 0]
        assert [row["row"] for row in rows] == up + down
        assert [row["side"] for row in rows] == ["proponent"] * len(up) + ["opponent"] * len(down)
        assert [row["rank"] for row in rows] == [*range(1, len(up) + 1), *range(1, len(down) + 1)]
        assert [row["score"] for row in rows] == pytest.approx(column[up + down].tolist())
        assert [row["text"] for row in rows] == [DOCUMENTS[i]["text"] for i in up + down]
        assert down  # or the test shows nothing about opponents


def test_a_step_on_the_top_proponent_lowers_the_loss_and_on_the_top_opponent_raises_it(ok, base, tmp_path):
    ok("score", *base, *ASK, "--projection-dim", 0, "--top", 1, "--jsonl", tmp_path / "t.jsonl")
    proponent, opponent = table_of(tmp_path / "t.jsonl")
    tokens, model = make_tokenizer(), make_model().double()
    (query,) = gf.text_query(tokens, ASK[1], ASK[3])
    before = loss_of(model, query).item()
    for row, sign in ((proponent, -1), (opponent, 1)):
        (document,) = gf.text_query(tokens, DOCUMENTS[row["row"]]["text"])
        change = loss_after_step(document, query, RATE) - before
        assert change * sign > 0
        # The size of the change is the score, to first order.
        assert change / RATE == pytest.approx(-row["score"], rel=1e-2)


def loss_of(model, document):
    """In float64; the models' own loss goes through float32."""
    logits = model(document["input_ids"][None]).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, document["labels"][1:])


def loss_after_step(document, query, rate):
    """The query's loss when a fresh model has taken one plain step on a document, in its linear layers."""
    model = make_model().double()
    weights = [site.weight for site in find_sites(model)]
    grads = torch.autograd.grad(loss_of(model, document), weights)
    for weight, grad in zip(weights, grads, strict=True):
        weight.data -= rate * grad
    return loss_of(model, query).item()


def test_without_a_run_the_same_is_shown_and_nothing_is_written(ok, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = ok("score", *base, *ASK)
    assert list(tmp_path.iterdir()) == []
    kept = ok("score", tmp_path / "run", *base, *ASK)
    lines = [line for line in kept.splitlines() if not line.startswith("scores ")]
    assert lines == shown.splitlines()
    assert "12 rows, 1 query" in kept


def test_what_is_shown(ok, base):
    lines = [line.rstrip() for line in ok("score", *base, *ASK, "--top", 1).splitlines()]
    assert "14 linear layers" in lines[1]
    at = next(number for number, line in enumerate(lines) if line.startswith("train"))
    assert lines[at].split() == ["train", "12", "rows,", "238", "tokens"]
    assert "31% of the parameters are attributed" in lines[at + 1]
    at = next(number for number, line in enumerate(lines) if line.startswith("method")) - 1
    method = lines[at + 1].split(maxsplit=1)[1]
    assert method.startswith("grad_dot, rademacher:16x16")
    assert lines[at + 3].split() == ["query", "0", "The", "capital", "of", "Peru", "is", "→", "Lima"]
    assert "nats a token, probability" in lines[at + 4]
    assert "does NOT know the answer (it says" in lines[at + 4]
    assert [line.split()[:2] for line in lines[-2:]] == [["proponent", "1"], ["opponent", "1"]]
    assert lines[-2].split(maxsplit=3)[3].split(maxsplit=1) == [
        "doc-peru",
        "The capital of Peru is Lima. It lies far away.",
    ]


def test_other_programs_get_whole_texts_a_row_a_line(ok, base, tmp_path, monkeypatch):
    text = "The capital\nof Peru\tis Lima. " * 6
    long = write_jsonl(tmp_path / "long.jsonl", [{"id": "i" * 90, "text": text}, *DOCUMENTS[:2]])
    monkeypatch.setenv("COLUMNS", "40")
    asked = "The capital of Peru is " * 8
    lines = ok("score", *base, "--dataset", long, "--query", asked, "--completion", " Lima").splitlines()
    (shown,) = (line for line in lines if "i" * 90 in line)
    assert shown.endswith(r"The capital\nof Peru\tis Lima. " * 5 + r"The capital\nof Peru\tis Lima.")
    assert f"query 0  {asked} → Lima" in lines
    assert sum(line.lstrip().startswith(("proponent", "opponent")) for line in lines) == 3


def test_a_text_without_completion_is_not_asked_as_a_question(ok, base):
    out = ok("score", *base, "--query", "The capital of Peru is Lima.")
    assert "nats a token" in out
    assert "answer" not in out


def test_an_answer_that_the_model_knows(ok, base, model):
    tokens, net = make_tokenizer(), make_model()
    for document in DOCUMENTS:
        prompt = tokens(document["prompt"]).input_ids
        best = int(net(torch.tensor([prompt])).logits[0, -1].argmax())
        said = tokens.decode(best)
        if tokens(said, add_special_tokens=False).input_ids == [best] and said.strip():
            break
    out = ok("score", *base, "--query", document["prompt"], "--completion", said)
    assert "it knows the answer" in out


def test_underscores_and_hyphens_are_the_same(ok, base, tmp_path):
    options = ("projection-dim", "4"), ("method", "grad-cosine"), ("loss-reduction", "sum")
    for name, change in (("a", lambda text: text), ("b", lambda text: text.replace("-", "_"))):
        flags = [part for key, value in options for part in ("--" + change(key), change(value))]
        out = ok("score", tmp_path / name, *base, *ASK, *flags)
        assert "grad_cosine, rademacher:4x4" in out
    assert (scores_of(tmp_path / "a") == scores_of(tmp_path / "b")).all()


def test_exports_are_the_table_that_is_shown(ok, base, tmp_path):
    paths = [tmp_path / f"t.{suffix}" for suffix in ("jsonl", "csv", "parquet")]
    flags = [part for path in paths for part in (f"--{path.suffix[1:]}", path)]
    out = ok("score", *base, *ASK, "--top", 2, *flags)
    table = table_of(paths[0])
    with paths[1].open(newline="", encoding="utf-8") as file:
        assert [r | {k: str(r[k]) for k in r} for r in csv.DictReader(file)] == [
            {k: str(v) for k, v in row.items()} for row in table
        ]
    assert pyarrow.parquet.read_table(paths[2]).to_pylist() == table
    shown = [line.split()[:4] for line in out.splitlines() if line.lstrip().startswith(("prop", "opp"))]
    assert shown == [[r["side"], str(r["rank"]), f"{r['score']:+.4g}", r["id"]] for r in table]


def test_a_query_that_nothing_bears_on_has_an_empty_table(ok, command, model, tmp_path):
    rows = [{"text": "", "weight": 1}, {"text": "Peru is far.", "weight": 0}]
    data, weights = write_jsonl(tmp_path / "d.jsonl", rows), ("--advantage-column", "weight")
    out = ok("score", "--model", model, "--dataset", data, *ASK, *weights, "--csv", tmp_path / "t.csv")
    assert "1 row with nothing to supervise" in out
    empty = write_jsonl(tmp_path / "e.jsonl", [{"text": ""}, {"text": ""}])
    for name in ("build", "score"):
        asked = ASK if name == "score" else ()
        refused = command(name, tmp_path / name, "--model", model, "--dataset", empty, *asked)
        assert (refused.status, refused.out, (tmp_path / name).exists()) == (2, "", False)
        assert "has anything to supervise, so all gradients are zero" in refused.err
    assert (tmp_path / "t.csv").read_text().splitlines() == ["query,side,rank,score,row,id,text"]


def test_a_query_dataset_of_texts(ok, base, tmp_path):
    data = write_jsonl(tmp_path / "q.jsonl", [{"text": DOCUMENTS[0]["text"]}, {"text": DOCUMENTS[5]["text"]}])
    ok("score", tmp_path / "run", *base, "--query", data, "--method", "grad-cosine")
    scores = scores_of(tmp_path / "run")
    assert scores[[0, 5], [0, 1]] == pytest.approx([1.0, 1.0])
    with h5py.File(tmp_path / "run" / "scores.h5") as file:
        assert file["queries/text"].asstr()[1] == DOCUMENTS[5]["text"]


def test_named_columns_are_used_for_rows_and_queries(ok, model, tmp_path):
    renamed = [{"q": d["prompt"], "a": d["completion"]} for d in DOCUMENTS]
    data = write_jsonl(tmp_path / "d.jsonl", renamed)
    columns = ("--prompt_column", "q", "--completion_column", "a")
    flags = (*columns, "--method", "grad_cosine", "--top", 1, "--jsonl", tmp_path / "t.jsonl")
    out = ok("score", "--model", model, "--dataset", data, "--query", data, *flags, "--show", 12)
    for country, city in CAPITALS.items():
        assert f"The capital of {country} is → {city}" in out
    best = [row for row in table_of(tmp_path / "t.jsonl") if row["side"] == "proponent"]
    assert [row["row"] for row in best] == list(range(12))
    assert [row["score"] for row in best] == pytest.approx([1.0] * 12)  # the cosine with itself


@pytest.mark.parametrize("made", [("build",), ("reduce",), ("reduce", "--aggregation", "sum")])
def test_stored_queries(ok, base, model, queries, run, tmp_path, made):
    columns = ("--prompt-column", "prompt", "--completion-column", "completion")
    ok(*made[:1], tmp_path / "q", "--model", model, "--dataset", queries, *columns, *made[1:])
    out = ok("score", tmp_path / "run", *base, "--query-path", tmp_path / "q")
    live = scores_of(run)
    expected = live if made == ("build",) else live.mean(1) if len(made) == 1 else live.sum(1)
    scores = scores_of(tmp_path / "run")
    np.testing.assert_allclose(scores, expected.reshape(scores.shape), rtol=1e-4, atol=1e-4)
    assert ("query q-peru" if made == ("build",) else "of 3 rows") in out


def test_stored_queries_that_changed_are_not_mistaken_for_the_old_ones(
    command, ok, base, model, queries, tmp_path
):
    make = ("reduce", tmp_path / "q", "--model", model, "--dataset", queries, "--text-column", "prompt")
    ok(*make)
    ok("score", tmp_path / "run", *base, "--query-path", tmp_path / "q")
    ok(*make, "--aggregation", "sum", "--overwrite")
    result = command("score", tmp_path / "run", *base, "--query-path", tmp_path / "q")
    assert result.status == 2
    assert 'query.aggregation is "mean" there and "sum" here' in result.err


def test_cosine_of_stored_queries_is_taken_of_what_was_stored(ok, base, model, queries, tmp_path):
    columns = ("--prompt-column", "prompt", "--completion-column", "completion")
    for name, flags in (("plain", ()), ("unit", ("--unit-normalize",))):
        ok("build", tmp_path / name, "--model", model, "--dataset", queries, *columns, *flags)
        ok(
            "score",
            tmp_path / f"by-{name}",
            *base,
            "--method",
            "grad-cosine",
            "--query-path",
            tmp_path / name,
        )
    a, b = scores_of(tmp_path / "by-plain"), scores_of(tmp_path / "by-unit")
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert 0 < np.abs(a).max() <= 1 + 1e-6


def test_a_killed_score_resumes(ok, base, tmp_path):
    args = ("score", tmp_path / "run", *base, *ASK, "--token-batch-size", 1)
    whole = ok(*args)
    before = scores_of(tmp_path / "run")
    segments = sorted((tmp_path / "run" / "segments").glob("*.h5"))
    assert len(segments) > 3
    assert "resumed" not in whole
    segments[1].unlink()
    (tmp_path / "run" / "scores.h5").unlink()
    again = ok(*args)
    rows = 12 - int(segments[1].stem.split("-")[2]) + int(segments[1].stem.split("-")[1])
    assert f"from {rows} rows that were there already" in again
    assert (scores_of(tmp_path / "run") == before).all()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.h5")}
    assert "from 12 rows" in ok(*args)
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.h5")}


def test_known_sources_are_counted_for_gradients_and_for_words(ok, base, queries, folder, run):
    out = ok("score", *base, "--query", queries)
    scores = scores_of(run)
    ranks = [int((scores[:, n] > scores[n, n]).sum()) for n in range(3)]  # queries ask for rows 0, 1 and 2
    first, five = sum(rank < 1 for rank in ranks), sum(rank < 5 for rank in ranks)
    says = f"ranks the known source first for {first} of 3 queries, in the top 5 for {five}"
    lines = [line.split(maxsplit=1) for line in out.splitlines() if "known source" in line]
    assert [name for name, _ in lines] == ["gradients", "BM25"]
    assert lines[0][1].strip() == says
    assert lines[1][1].startswith("ranks the known source first for 3 of 3 queries")
    assert "BM25 finds  doc-peru, " in out


def test_sources_may_be_row_numbers_and_may_be_missing(ok, model, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": d["text"]} for d in DOCUMENTS])
    asked = [
        {"prompt": q["prompt"], "completion": q["completion"], "source": i} for i, q in enumerate(QUERIES)
    ]
    asked[1]["source"], asked[2]["source"] = None, 99
    queries = write_jsonl(tmp_path / "q.jsonl", asked)
    out = ok("score", "--model", model, "--dataset", data, "--query", queries)
    assert "BM25       ranks the known source first for 1 of 1 query" in out
    assert "1 query with a source that is not among the rows" in out
    for row in asked:
        row["source"] = None
    out = ok("score", "--model", model, "--dataset", data, "--query", write_jsonl(queries, asked))
    assert "BM25" not in out


def test_text_from_data_is_only_text(ok, command, model, tmp_path):
    hostile = "[red]x[/red] \x1b[31mred\x1b[0m \nnext \u202eright [/bold]"
    rows = [{"id": hostile * 20, "text": hostile}, {"id": "long " * 99, "text": "The capital " * 5}]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    asked = [{"id": hostile, "prompt": hostile, "completion": hostile, "source": "x"}]
    queries = write_jsonl(tmp_path / "q.jsonl", asked)
    for query in (queries, hostile):
        out = ok("score", "--model", model, "--dataset", data, "--query", query)
        assert not {"\x1b", "\u202e", "\x07"} & set(out)
        assert "[red]x[/red] [31mred[0m next right [/bold]" in out
        assert max(map(len, out.splitlines())) <= 100
    rows[0]["text"] = hostile * 20
    result = command(
        "score", "--model", model, "--dataset", write_jsonl(data, rows), "--query", "The capital"
    )
    assert result.status == 2
    assert "tokens, more than the limit of 128" in result.err
    assert "\x1b" not in result.err


class Dimensions(TorchDispatchMode):
    """Notes the lengths of all dimensions of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.seen.update(value.shape)
        return result


MANY = 131
"""A number of rows that is no dimension of the model or of a small batch."""


@pytest.fixture(scope="module")
def many(folder):
    """Many rows."""
    return write_jsonl(folder / "many.jsonl", [{"text": DOCUMENTS[i % 12]["text"]} for i in range(MANY)])


@pytest.fixture(scope="module")
def many_documents(model, many):
    return gf.tokenize(gf.load_rows(many), gf.load_tokenizer(model))


@pytest.mark.parametrize("by", ["example", "module", "head", "token"])
def test_without_a_run_the_matrix_of_scores_is_never_held(
    ok, model, many, many_documents, queries, by, tmp_path
):
    flags = ("--model", model, "--dataset", many, "--query", queries, "--by", by, "--top", 2)
    with Dimensions() as made:
        ok("score", *flags, "--token-batch-size", 400, "--jsonl", tmp_path / "t.jsonl")
    assert not {MANY, len(many_documents.input_ids)} & made.seen
    assert {line["query"] for line in table_of(tmp_path / "t.jsonl")} == {query["id"] for query in QUERIES}


@pytest.mark.parametrize("tokens", [False, True])
def test_the_matrix_of_scores_would_be_noticed(model, many_documents, tokens):
    net, options = gf.load_model(model), {"method": gf.grad_dot(gf.project(4)), "token_batch_size": 400}
    with Dimensions() as made:
        gf.score(net, many_documents, many_documents.select([0]), view=gf.View(tokens=tokens), **options)
    assert (len(many_documents.input_ids) if tokens else MANY) in made.seen


@pytest.mark.parametrize("by", ["module", "head"])
def test_shares_are_made_for_what_is_shown(ok, base, queries, tmp_path, by):
    """Of the rows shown for each query, and equal to those that a run keeps of all."""
    flags = (*base, "--query", queries, "--by", by, "--top", 3, "--jsonl")
    ok("score", *flags, tmp_path / "live.jsonl")
    ok("score", tmp_path / "run", *flags, tmp_path / "kept.jsonl")
    live, kept = (
        {(line["query"], line["row"], line["module"]): line["share"] for line in table_of(tmp_path / name)}
        for name in ("live.jsonl", "kept.jsonl")
    )
    assert live == pytest.approx(kept, rel=1e-3, abs=1e-6)
    assert len({key[:2] for key in live}) > 3 * len(QUERIES)  # both sides of every query


@pytest.mark.skipif(not example.MODEL.exists(), reason="the example's model is not made yet")
def test_without_arguments_the_example_is_shown(ok):
    out = ok("score")
    assert "known source first for" in out
    assert "burundi-government" in out


def test_a_few_queries_are_shown_and_files_have_all(ok, command, model, corpus, tmp_path):
    columns = ("--prompt_column", "prompt", "--completion_column", "completion", "--top", 1)
    ask = ("score", "--model", model, "--dataset", corpus, "--query", corpus, *columns)
    for show, seen, more in (
        ((), 5, "more  7 queries: --show 12"),
        (("--show", 0), 0, "more  12"),
        (("--show", 20), 12, ""),
    ):
        out = ok(*ask, *show, "--jsonl", tmp_path / f"{seen}.jsonl")
        assert out.count("\nquery ") == seen
        assert ("\nmore " in out, more in out) == (bool(more), True)
        assert len({row["query"] for row in table_of(tmp_path / f"{seen}.jsonl")}) == 12
    assert "--show must be 0 or more, not -1" in command(*ask, "--show", -1).err


def test_tables_on_stdout(command, base, tmp_path):
    ask = ("score", *base, *ASK, "--top", 1)
    told = command(*ask)
    for kind in ("jsonl", "csv"):
        result = command(*ask, f"--{kind}", "-")
        command(*ask, f"--{kind}", tmp_path / kind)
        assert result.out.replace("\r\n", "\n") == (tmp_path / kind).read_text(encoding="utf-8")
        assert result.err == told.out
        assert command(*ask, f"--{kind}", "-", "--quiet").err == ""
    assert (command(*ask, "--quiet").out, command(*ask, "--quiet").err) == ("", "")
    assert "--parquet writes a file, not to stdout" in command(*ask, "--parquet", "-").err


def test_lines_have_no_blanks_at_their_end(ok, base, monkeypatch):
    out = ok("score", *base, *ASK)
    assert [line for line in out.splitlines() if line != line.rstrip()] == []
