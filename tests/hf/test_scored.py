"""A column of scores stands beside the rows that it is of, stored or scored as a dataset is mapped."""

import pickle
from functools import partial

import pytest
import torch
from datasets import Dataset, IterableDataset
from tiny import DOCUMENTS, make_model, make_tokenizer

import gradfn as gf
from gradfn.errors import InputError


@pytest.fixture(scope="module")
def scored():
    model, tokenizer = make_model().double(), make_tokenizer()
    rows = Dataset.from_list(DOCUMENTS)
    encode = partial(gf.tokenize, tokenizer=tokenizer)
    queries = encode(rows.select(range(2)))
    scores = gf.score(model, encode(rows), queries, method=gf.grad_dot())
    return model, rows, encode, queries, scores


def test_scores_stand_beside_their_rows(scored):
    _, rows, _, _, scores = scored
    made = gf.hf.with_scores(rows, scores)
    assert made["gradfn_score"][:] == scores.matrix.tolist()
    shuffled = gf.hf.with_scores(rows.shuffle(seed=1), scores, column="score")
    expected = dict(zip(scores.row_ids, scores.matrix.tolist(), strict=True))
    assert shuffled["id"][:] != rows["id"][:]
    assert shuffled["score"][:] == [expected[name] for name in shuffled["id"]]


def test_one_query_is_a_number_a_row(scored):
    _, rows, _, _, scores = scored
    one = scores.of_queries(torch.tensor([1]))
    assert gf.hf.with_scores(rows, one)["gradfn_score"][:] == scores.matrix[:, 1].tolist()
    nameless = gf.Scores(one.values, [str(row) for row in range(len(rows))], ["q"])
    assert gf.hf.with_scores(rows.remove_columns("id"), nameless)[3]["gradfn_score"] == scores.matrix[3, 1]


def test_other_rows_are_refused(scored):
    _, rows, _, _, scores = scored
    with pytest.raises(InputError, match="has 11 rows and the scores are of 12"):
        gf.hf.with_scores(rows.select(range(11)), scores)
    with pytest.raises(InputError, match="row '0' has no score"):
        gf.hf.with_scores(rows.remove_columns("id"), scores)
    with pytest.raises(InputError, match="several rows have one id"):
        gf.hf.with_scores(rows.select([0, *range(11)]), scores)
    with pytest.raises(InputError, match="a column 'text' already"):
        gf.hf.with_scores(rows, scores, column="text")


def test_scores_of_tokens_are_no_column(scored):
    _, rows, _, _, scores = scored
    tokens = gf.Scores(scores.values, scores.row_ids, scores.query_ids, documents=torch.arange(12))
    with pytest.raises(InputError, match="scores of tokens"):
        gf.hf.with_scores(rows, tokens)


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_are_scored_as_they_are_mapped(scored, streamed):
    model, rows, encode, queries, scores = scored
    score = gf.hf.scorer(model, queries, encode, method=gf.grad_dot())
    source = IterableDataset.from_generator(lambda: iter(DOCUMENTS)) if streamed else rows
    made = [row["gradfn_score"] for row in source.map(score, batched=True, batch_size=5)]
    torch.testing.assert_close(torch.tensor(made, dtype=torch.float64), scores.matrix)


def test_the_queries_are_differentiated_once(scored):
    model, rows, encode, queries, _ = scored
    H = gf.fit(gf.ekfac(), model, encode(rows))
    method, asked = gf.influence(H), []

    class Counted:
        damping = method.damping

        def scorer(self, subject, query, **options):
            asked.append(len(query))
            return method.scorer(subject, query, **options)

        def settings(self):
            return {}

    one = queries.select([0])
    score = gf.hf.scorer(model, one, encode, method=Counted())
    made = rows.map(score, batched=True, batch_size=4)["gradfn_score"][:]
    assert asked == [1]
    expected = gf.score(model, encode(rows), one, method=method).matrix[:, 0]
    torch.testing.assert_close(torch.tensor(made, dtype=torch.float64), expected)


def test_a_map_never_reads_the_scores_of_another_scorer(scored):
    model, _, encode, queries, _ = scored
    one, other = (gf.hf.scorer(model, queries, encode, method=gf.grad_dot()) for _ in range(2))
    assert len(pickle.dumps(one)) < 200
    assert pickle.dumps(one) != pickle.dumps(other)
    with pytest.raises(InputError, match="map without `num_proc`"):
        pickle.loads(pickle.dumps(one))


def test_what_no_map_can_score_is_refused(scored):
    model, rows, encode, queries, _ = scored
    several = gf.influence(
        gf.fit(gf.ekfac(), model, encode(rows)), damping=(gf.Damping(0.1), gf.Damping(1.0))
    )
    with pytest.raises(InputError, match="2 dampings, and a column one"):
        gf.hf.scorer(model, queries, encode, method=several)
    with pytest.raises(InputError, match=r"View\(tokens=False\)"):
        gf.hf.scorer(model, queries, encode, method=gf.grad_dot(), view=gf.View(tokens=True))
    score = gf.hf.scorer(model, queries, encode, method=gf.grad_dot(), column="text")
    with pytest.raises(InputError, match="a column 'text' already"):
        rows.map(score, batched=True)
