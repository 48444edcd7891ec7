"""Scores as one value: the best rows, tables, and what is saved and loaded."""

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets

from gradfn.errors import InputError
from gradfn.scores import Scores, top_k
from gradfn.store import open_writer


def scores_of(dampings=("0.1", "none"), rows=4, queries=3, **more):
    values = torch.randn(len(dampings), rows, queries, generator=torch.Generator().manual_seed(0))
    return Scores(values, [f"r{i}" for i in range(rows)], [f"q{i}" for i in range(queries)], dampings, **more)


def test_what_is_saved_is_loaded(tmp_path):
    made = scores_of(
        losses=torch.arange(4.0).double(), query_texts=["a", "b\0", "c"], settings={"recipe": "x"}
    )
    assert made.save(tmp_path / "run") == tmp_path / "run" / "scores.h5"
    again = Scores.load(tmp_path / "run")
    assert torch.equal(again.values, made.values)
    for name in ("row_ids", "query_ids", "dampings", "settings", "documents", "positions"):
        assert getattr(again, name) == getattr(made, name), name
    assert torch.equal(again.losses, made.losses)
    assert (again.query_texts, again.name) == (["a", "b", "c"], "run")
    assert torch.equal(Scores.load(tmp_path / "run" / "scores.h5").values, made.values)


def test_tokens_and_shares_are_saved(tmp_path):
    made = scores_of(documents=torch.tensor([0, 0, 1, 1]), positions=torch.tensor([0, 1, 0, 1]))
    shares = {"a.b": made.values * 0.25, "c": made.values * 0.75}
    made = Scores(**{**vars(made), "shares": shares})
    made.save(tmp_path)
    again = Scores.load(tmp_path)
    assert torch.equal(again.documents, made.documents)
    assert torch.equal(again.positions, made.positions)
    assert again.row_ids == made.row_ids
    assert again.shares.keys() == shares.keys()
    assert all(torch.equal(again.shares[name], share) for name, share in shares.items())


def test_other_scores_are_replaced_only_when_asked_for(tmp_path):
    scores_of(settings={"recipe": "x"}).save(tmp_path)
    other = scores_of(("",), settings={"recipe": "y"})
    with pytest.raises(InputError, match=r'recipe is "x" there and "y" here.*give `overwrite=True`'):
        other.save(tmp_path)
    other.save(tmp_path, overwrite=True)
    assert torch.equal(Scores.load(tmp_path).values, other.values)


def test_one_damping_is_taken_by_its_name():
    made = scores_of()
    assert torch.equal(made.of_damping("none").matrix, made.values[1])
    with pytest.raises(InputError, match=r"for 2 dampings, 0.1, none: take one with `of_damping\('0.1'\)`"):
        _ = made.matrix
    with pytest.raises(InputError, match=r"no damping '1': choose from 0\.1, none"):
        made.of_damping("1")


def test_some_queries_keep_their_names_texts_and_shares():
    made = scores_of(("",), query_texts=["a", "b", "c"])
    made = Scores(**{**vars(made), "shares": {"block": made.values}})
    some = made.of_queries(torch.tensor([2, 0]))
    assert (some.query_ids, some.query_texts) == (["q2", "q0"], ["c", "a"])
    assert torch.equal(some.matrix, made.matrix[:, [2, 0]])
    assert torch.equal(some.shares["block"], made.values[:, :, [2, 0]])


def test_a_table_has_a_line_for_every_query_damping_and_row():
    made = scores_of(documents=torch.tensor([0, 0, 1, 1]), positions=torch.tensor([0, 1, 0, 1]))
    table = made.to_pandas()
    assert list(table) == ["query", "damping", "row", "id", "document", "position", "score"]
    assert len(table) == 2 * 4 * 3
    for line in table.itertuples():
        d, q = made.dampings.index(line.damping), made.query_ids.index(line.query)
        assert line.score == made.values[d, line.row, q].item()
        assert (line.id, line.document, line.position) == (f"r{line.row}", line.row // 2, line.row % 2)


def test_a_dataset_stands_beside_the_training_set():
    made, train = scores_of(("",)), Dataset.from_dict({"id": list("abcd")})
    both = concatenate_datasets([train, made.to_dataset()], axis=1)
    assert both.column_names == ["id", "q0", "q1", "q2"]
    np.testing.assert_allclose(np.array(both["q1"]), made.matrix[:, 1].numpy())
    with pytest.raises(InputError, match="take one"):
        scores_of().to_dataset()
    with pytest.raises(InputError, match="two queries have one name"):
        Scores(made.values, made.row_ids, ["q", "q", "r"]).to_dataset()


def test_as_many_names_as_values():
    with pytest.raises(InputError, match=r"scores of shape \[1, 2, 1\] have names for \[1, 2, 2\] dampings"):
        Scores(torch.zeros(1, 2, 1), ["a", "b"], ["q", "r"])


def test_scores_without_names_of_dampings_are_refused(tmp_path):
    with open_writer(tmp_path, "scores", {}, 1) as writer:
        writer.write(0, 1, {"scores": np.zeros((1, 1, 1)), "rows/id": ["a"]})
        writer.finish({"queries/id": ["q"]})
    with pytest.raises(InputError, match="no array 'dampings'"):
        Scores.load(tmp_path)


def test_top_k_gives_opponents_lowest_first():
    scores = torch.tensor([[1.0, -1.0], [-2.0, 5.0], [0.0, 0.0]])
    best = top_k([scores], 2, largest=False)
    assert best.rows.tolist() == [[1, 2], [0, 2]]
    assert best.scores.tolist() == [[-2.0, 0.0], [-1.0, 0.0]]


def test_top_k_of_fewer_rows_gives_them_all():
    assert top_k([torch.tensor([[1.0]])], 10).rows.tolist() == [[0]]


@pytest.mark.parametrize("k", [0, -1])
def test_top_k_refuses_a_k_below_1(k):
    with pytest.raises(InputError, match="1 or more"):
        top_k([torch.ones(1, 1)], k)


def test_top_k_of_nothing_is_refused():
    with pytest.raises(InputError, match="no rows"):
        top_k([], 1)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("values", ["few", "zeros", "one", "nan", "distinct"])
def test_the_best_are_those_of_a_stable_sort_whatever_is_equal(largest, values):
    """Equal scores stand in the order of their rows; topk alone takes any of them."""
    generator = torch.Generator().manual_seed(0)
    scores = {
        "few": torch.randint(-2, 3, (500, 6), generator=generator).float(),
        "zeros": torch.randn(500, 6, generator=generator) * (torch.arange(500)[:, None] % 100 == 7),
        "one": torch.ones(500, 6),
        "nan": torch.randn(500, 6, generator=generator).where(torch.arange(500)[:, None] % 3 > 0, torch.nan),
        "distinct": torch.randn(500, 6, generator=generator),
    }[values]
    for step in (500, 37):
        for k in (1, 5, 40):
            found = top_k(scores.split(step), k, largest=largest)
            wanted = scores.argsort(dim=0, descending=largest, stable=True)[:k].T
            assert torch.equal(found.rows, wanted)
            assert torch.equal(found.scores.nan_to_num(), scores.T.gather(1, wanted).nan_to_num())
