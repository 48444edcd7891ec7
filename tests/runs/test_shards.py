import os
import shutil

import h5py
import numpy as np
import pytest
import torch
from tiny import language_model, mostly_slow

import gradfn as gf
from gradfn.errors import InputError
from gradfn.model.sites import View
from gradfn.runs import rows as run_rows
from gradfn.runs.merge import hessian_shard, merge_run
from gradfn.runs.scores import score_run
from gradfn.runs.shards import (
    Shard,
    complete_shards,
    join_shards,
    parse_shard,
    shard_rows,
    shard_run,
    shards_of,
)
from gradfn.statistics import ekfac, eshampoo, fold, kfac, second_moment, shampoo, tkfac
from gradfn.store import open_part, open_store, open_writer
from gradfn.store import writer as writing

SIZES = (5, 3, 8, 1, 4, 7, 2, 6, 1, 3, 5)


@pytest.fixture(scope="module")
def model():
    return language_model("llama").requires_grad_(False)


@pytest.fixture(scope="module")
def documents():
    generator = np.random.default_rng(0)
    return gf.make_documents([generator.integers(0, 11, size).tolist() for size in SIZES])


def all_of(count):
    return [Shard(number, count) for number in range(1, count + 1)]


def everything_in(run, kind="store"):
    with open_store(run, kind) as there:
        arrays = {name: there.read(name) for name in there.names()}
        return arrays, {name: there.index_array(name) for name in there.header.index_arrays}, there.settings


def same(a, b, rtol=1e-9):
    """Two stores hold the same arrays under the same settings; numbers to rounding, or bit for bit."""
    for mine, theirs in zip(a[:2], b[:2], strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            if rtol and mine[name].dtype.kind == "f":
                np.testing.assert_allclose(mine[name], theirs[name], rtol=rtol, atol=1e-11)
            else:
                np.testing.assert_array_equal(mine[name], theirs[name])
    assert a[2] == b[2]


def write(run, shard, rows=5, settings=None, kind="store", sizes=None):
    part = shard_rows(np.ones(rows, int) if sizes is None else sizes, shard)
    span = part.start, part.stop
    with open_writer(shard_run(run, shard), kind, settings or {}, rows, part=span) as writer:
        for start, stop in writer.missing([span]):
            writer.write(start, stop, {"value": np.arange(start, stop) * 10.0})
        writer.finish({"names": ["a", "b"]})


# --- which rows


@pytest.mark.parametrize("seed", range(40))
def test_parts_are_contiguous_filled_and_balanced(seed):
    generator = np.random.default_rng(seed)
    rows = int(generator.integers(1, 30))
    sizes = generator.integers(0, 200, rows) ** 2
    for count in range(1, rows + 1):
        parts = [shard_rows(sizes, shard) for shard in all_of(count)]
        assert [row for part in parts for row in part] == list(range(rows))
        assert min(map(len, parts)) >= 1
        counted = np.maximum(sizes, 1)
        most = max(int(counted[part.start : part.stop].sum()) for part in parts)
        assert most <= counted.sum() / count + counted.max()


def test_equal_rows_are_cut_evenly():
    assert [len(shard_rows(np.ones(10, int), shard)) for shard in all_of(5)] == [2] * 5


def test_more_shards_than_rows():
    with pytest.raises(
        InputError, match=r"^3 rows do not go into 4 shards: give `shard=Shard\(I, 3\)`, or fewer shards$"
    ):
        shard_rows(np.ones(3, int), Shard(1, 4))


@pytest.mark.parametrize("text", ["2/8", " 1/1 "])
def test_a_shard_is_read(text):
    assert str(parse_shard(text)) == text.strip()
    assert parse_shard(None) is None


@pytest.mark.parametrize("text", ["", "3", "2/", "a/b", "-1/4", "1.0/2", "1/2/3", "²/3"])
def test_what_is_no_shard(text):
    with pytest.raises(InputError, match=r"^a shard is I/N, the I-th of N parts, not .*: give 2/8, say$"):
        parse_shard(text)


@pytest.mark.parametrize("text", ["0/4", "5/4", "0/0"])
def test_shards_are_numbered_from_one(text):
    with pytest.raises(InputError, match=f"^a shard is I/N with I from 1 to N, not {text}: give"):
        parse_shard(text)


# --- joining


@pytest.mark.parametrize("count", range(1, 6))
@pytest.mark.parametrize("kind", ["store", "scores", "truth"])
def test_joined_parts_are_the_whole(tmp_path, count, kind):
    with open_writer(tmp_path / "whole", kind, {"dim": 2}, 5) as writer:
        writer.write(0, 5, {"value": np.arange(5) * 10.0})
        writer.finish({"names": ["a", "b"]})
    for shard in reversed(all_of(count)):
        write(tmp_path / "run", shard, settings={"dim": 2}, kind=kind)
    path = join_shards(tmp_path / "run", kind)
    same(everything_in(tmp_path / "run", kind), everything_in(tmp_path / "whole", kind), rtol=0)
    with h5py.File(path) as file:  # as any other HDF5 tool sees it
        np.testing.assert_array_equal(file["value"][()], np.arange(5) * 10.0)
    before = path.read_bytes()
    assert join_shards(tmp_path / "run", kind) == path
    assert path.read_bytes() == before


def test_the_shards_may_go_once_they_are_joined(tmp_path):
    for shard in all_of(2):
        write(tmp_path, shard)
    join_shards(tmp_path, "store")
    shutil.rmtree(tmp_path / "shards")
    np.testing.assert_array_equal(everything_in(tmp_path)[0]["value"], np.arange(5) * 10.0)


def test_shards_of_other_machines_are_copied_into_place(tmp_path):
    for shard in all_of(3):
        write(tmp_path / f"node{shard.number}", shard)
        shutil.copytree(tmp_path / f"node{shard.number}" / "shards", tmp_path / "run" / "shards",
                        dirs_exist_ok=True)  # fmt: skip
    join_shards(tmp_path / "run", "store")
    np.testing.assert_array_equal(everything_in(tmp_path / "run")[0]["value"], np.arange(5) * 10.0)


def test_where_no_link_can_be_made_segments_are_copied(tmp_path, monkeypatch):
    for shard in all_of(2):
        write(tmp_path, shard)

    def refused(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    join_shards(tmp_path, "store")
    for path in (tmp_path / "segments").glob("*.h5"):
        assert path.stat().st_nlink == 1
    shutil.rmtree(tmp_path / "shards")
    np.testing.assert_array_equal(everything_in(tmp_path)[0]["value"], np.arange(5) * 10.0)


def test_a_join_that_was_killed_is_repeated(tmp_path, monkeypatch):
    for shard in all_of(3):
        write(tmp_path, shard)
    linked, link = [], writing.link_or_copy

    def dies(path, target):
        if linked:
            raise KeyboardInterrupt
        linked.append(target)
        link(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "link_or_copy", dies)
        with pytest.raises(KeyboardInterrupt):
            join_shards(tmp_path, "store")
    assert len(list((tmp_path / "segments").glob("*.h5"))) == 1
    assert not (tmp_path / "store.h5").exists()
    join_shards(tmp_path, "store")
    np.testing.assert_array_equal(everything_in(tmp_path)[0]["value"], np.arange(5) * 10.0)


def refused(run, words, **options):
    before = sorted(run.rglob("*"))
    with pytest.raises(InputError, match=words):
        merge_run(run, **options)
    assert sorted(run.rglob("*")) == before


def test_missing_shards_are_named(tmp_path):
    for number in (2, 3):
        write(tmp_path, Shard(number, 5))
    refused(
        tmp_path,
        r"^shards 1, 4 and 5 of 5 of the store of .* are missing: run their commands \(`shard=Shard\(1",
    )
    write(tmp_path, Shard(1, 5))
    write(tmp_path, Shard(4, 5))
    refused(
        tmp_path,
        r"^shard 5 of 5 of the store of .* is missing: run its command \(`shard=Shard\(5, 5\)`\), then merge",
    )


def test_an_incomplete_shard_is_named(tmp_path):
    write(tmp_path, Shard(1, 2))
    with open_writer(shard_run(tmp_path, Shard(2, 2)), "store", {}, 5, part=(2, 5)) as writer:
        writer.write(2, 4, {"value": np.arange(2, 4) * 10.0})
        with pytest.raises(InputError, match=r"lacks 1 of its 3 rows, the first of them row 4"):
            writer.finish()
    refused(tmp_path, r"^shard 2 of 2 of the store of .* is incomplete: run its command again, which resumes")


def test_nothing_is_joined_while_another_kind_is_incomplete(tmp_path):
    for shard in all_of(2):
        write(tmp_path, shard)
    write(tmp_path, Shard(1, 2), kind="scores")
    refused(tmp_path, "^shard 2 of 2 of the scores of .* is missing")


def test_shards_of_two_counts_overlap(tmp_path):
    write(tmp_path, Shard(1, 2))
    write(tmp_path, Shard(2, 3))
    refused(tmp_path, "^.* has shards 1/2 and 2/3 of its store, which overlap: delete .*shards/2-of-3 and")


def test_shards_made_differently_are_named(tmp_path):
    for shard in all_of(3):
        write(tmp_path, shard, settings={"transform": {"dim": 8 if shard.number == 3 else 4}})
    refused(
        tmp_path,
        r"^shards 1/3 and 3/3 of the store .* differently \(transform.dim is 4 there and 8 here\): make",
    )


@pytest.mark.parametrize(
    ("sizes", "words"),
    [([1, 1, 1, 1, 9], "overlap in rows 2 to 4"), ([9, 9, 1, 1, 1], "leave out rows 1 to 2")],
)
def test_shards_that_were_cut_differently(tmp_path, sizes, words):
    parts = [shard_rows(np.array(sizes), Shard(1, 2)), shard_rows(np.array([1, 1, 1, 1, 1]), Shard(2, 2))]
    for shard, part in zip(all_of(2), parts, strict=True):
        with open_writer(shard_run(tmp_path, shard), "store", {}, 5, part=(part.start, part.stop)) as writer:
            writer.write(part.start, part.stop, {"value": np.zeros(len(part))})
            writer.finish()
    refused(tmp_path, f"^the shards of the store of .* {words}, at shard 2/2: make them again with `over")


def test_a_damaged_shard_is_refused(tmp_path):
    for shard in all_of(2):
        write(tmp_path, shard)
    (segment,) = (shard_run(tmp_path, Shard(2, 2)) / "segments").glob("*.h5")
    segment.write_bytes(segment.read_bytes()[:-100])
    refused(tmp_path, r"2-of-2.* is damaged \(it was cut short\)")


def test_rows_of_a_run_without_shards_are_not_mixed_in(tmp_path):
    with open_writer(tmp_path, "store", {}, 5) as writer:
        writer.write(0, 3, {"value": np.zeros(3)})
    for shard in all_of(2):
        write(tmp_path, shard)
    with pytest.raises(
        InputError, match=r"has rows 0 to 3 of a run without shards: give `overwrite=True` to take"
    ):
        merge_run(tmp_path)
    merge_run(tmp_path, overwrite=True)
    np.testing.assert_array_equal(everything_in(tmp_path)[0]["value"], np.arange(5) * 10.0)


def test_all_rows_of_a_run_without_shards_are_not_taken_for_those_of_the_shards(tmp_path):
    for shard in all_of(2):
        write(tmp_path, shard)
    with open_writer(tmp_path, "store", {}, 5) as writer:
        writer.write(0, 5, {"value": np.arange(5) + 100.0})
        writer.finish()
    refused(tmp_path, r"has rows 0 to 5 of a run without shards: give `overwrite=True` to take")
    merge_run(tmp_path, overwrite=True)
    np.testing.assert_array_equal(everything_in(tmp_path)[0]["value"], np.arange(5) * 10.0)


def remake(run, shard, values, kind):
    """Write a part anew with other values and the same settings."""
    part = shard_rows(np.ones(5, int), shard)
    span = part.start, part.stop
    with open_writer(shard_run(run, shard), kind, {}, 5, True, part=span) as writer:
        writer.write(*span, {"value": values[part.start : part.stop]})
        writer.finish({"names": ["a", "b"]})


@pytest.mark.parametrize("kind", ["store", "scores"])
@pytest.mark.parametrize("left", ["all", "segments", "index"])
def test_shards_that_were_made_again_are_not_taken_for_joined(tmp_path, kind, left):
    """Of a merge before there may be all, what one that was killed left, or (of scores) the copy alone."""
    for shard in all_of(2):
        write(tmp_path, shard, kind=kind)
    merge_run(tmp_path)
    if left == "segments":
        (tmp_path / f"{kind}.h5").unlink()
        (tmp_path / f"segments/{kind}-0000000000-0000000002.h5").unlink()
    if left == "index" and kind == "scores":
        shutil.rmtree(tmp_path / "segments")
        merge_run(tmp_path)
    remake(tmp_path, Shard(2, 2), np.arange(5) + 100.0, kind)
    refused(tmp_path, f"^rows 2 to 5 of the {kind} of .* are not those of its shards, which were made again:")
    merge_run(tmp_path, overwrite=True)
    np.testing.assert_array_equal(everything_in(tmp_path, kind)[0]["value"], [0, 10, 102, 103, 104])


def test_shards_that_were_made_again_to_the_same_rows_are_joined(tmp_path):
    for shard in all_of(2):
        write(tmp_path, shard)
    merge_run(tmp_path)
    remake(tmp_path, Shard(2, 2), np.arange(5) * 10.0, "store")
    assert merge_run(tmp_path)[0].shards == 2


def test_settings_of_all_kinds_are_checked_before_any_is_joined(tmp_path):
    for kind in ("scores", "truth"):
        for shard in all_of(2):
            write(tmp_path, shard, kind=kind)
    with open_writer(tmp_path, "truth", {"dim": 9}, 5) as writer:
        writer.write(0, 5, {"value": np.zeros(5)})
        writer.finish()
    refused(tmp_path, "was made with other settings .dim is 9 there")


def test_shards_at_checkpoints_are_joined_first(tmp_path):
    for run in (tmp_path / "checkpoint-10", tmp_path / "checkpoint-2", tmp_path):
        for shard in all_of(2):
            write(run, shard, kind="scores")
    names = [one.path.relative_to(tmp_path).as_posix() for one in merge_run(tmp_path)]
    assert names == ["checkpoint-2/scores.h5", "checkpoint-10/scores.h5", "scores.h5"]
    shutil.rmtree(shard_run(tmp_path / "checkpoint-2", Shard(2, 2)))
    refused(tmp_path, "^shard 2 of 2 of the scores of .*checkpoint-2 is missing")


def test_what_was_made_otherwise_is_replaced_only_when_told(tmp_path):
    with open_writer(tmp_path, "store", {"dim": 1}, 5) as writer:
        writer.write(0, 5, {"value": np.zeros(5)})
        writer.finish()
    for shard in all_of(2):
        write(tmp_path, shard, settings={"dim": 2})
    with pytest.raises(
        InputError, match=r"was made with other settings .dim is 1 there and 2 here.: give `over"
    ):
        merge_run(tmp_path)
    assert merge_run(tmp_path, overwrite=True)[0].shards == 2
    assert everything_in(tmp_path)[2] == {"dim": 2}


def test_a_run_without_shards(tmp_path):
    with pytest.raises(InputError, match=r"has no shards: write them with `shard=Shard\(I, N\)` of build"):
        merge_run(tmp_path)
    with pytest.raises(
        InputError, match=r"has no shards of its store: write them with `shard=Shard\(I, N\)`$"
    ):
        complete_shards(tmp_path, "store")


def test_a_part_is_read_by_the_numbers_of_its_rows(tmp_path):
    write(tmp_path, Shard(2, 2))
    there = open_part(shard_run(tmp_path, Shard(2, 2)), "store")
    assert there.span == (2, 5)
    np.testing.assert_array_equal(there.read("value", 3, 5), [30.0, 40.0])
    with pytest.raises(InputError, match=r"is a part, without rows 0 to 5: join the parts first$"):
        there.read("value")
    parts = shard_run(tmp_path, Shard(2, 2))
    for path, one in ((parts, "part"), (next((parts / "segments").glob("*.h5")), "segment")):
        with pytest.raises(InputError, match=f"is one {one} of a run: open the run directory, {tmp_path}$"):
            open_store(path)
    with pytest.raises(InputError, match=r"lies in shards: join them with `merge_run`"):
        open_store(tmp_path)
    writing = open_writer(shard_run(tmp_path, Shard(1, 1)), "store", {}, 5, part=(2, 5))
    with writing as writer, pytest.raises(InputError, match=r"^rows 1 to 3 are no slice of rows 2 to 5 of"):
        writer.write(1, 3, {"value": np.zeros(2)})


@pytest.mark.parametrize(
    ("part", "words"),
    [((3, 5), "is not of rows 3 to 5, which are this part's"), ((1, 5), r"of rows 2 to 5, not 1 to 5")],
)
def test_a_part_that_was_cut_otherwise_is_not_resumed(tmp_path, part, words):
    write(tmp_path, Shard(2, 2))
    mine = open_writer(shard_run(tmp_path, Shard(2, 2)), "store", {}, 5, part=part)
    with pytest.raises(InputError, match=f"{words}: give `overwrite"), mine:
        pass


def test_other_folders_are_no_shards(tmp_path):
    (tmp_path / "shards" / "old").mkdir(parents=True)
    (tmp_path / "shards" / "1-of-2").mkdir()
    assert shards_of(tmp_path) == {}


# --- gradients and scores


@pytest.mark.parametrize("count", range(1, 6))
@pytest.mark.parametrize("tokens", [False, True])
def test_a_store_built_in_shards_is_the_store(model, documents, tmp_path, count, tokens):
    how = {"view": View(tokens=tokens), "token_batch_size": 8}
    whole = gf.build(tmp_path / "whole", model, documents, gf.project(3), **how)
    parts = [gf.build(tmp_path / "run", model, documents, gf.project(3), shard=shard, **how)
             for shard in all_of(count)]  # fmt: skip
    (joined,) = merge_run(tmp_path / "run")
    assert (joined.kind, joined.shards) == ("store", count)
    same(everything_in(tmp_path / "run"), everything_in(tmp_path / "whole"))
    for fact in ("rows", "zero", "unsupervised"):
        assert sum(getattr(part, fact) for part in parts) == getattr(whole, fact)


def test_where_batches_agree_it_is_so_bit_for_bit(model, documents, tmp_path):
    gf.build(tmp_path / "whole", model, documents, token_batch_size=1)
    for shard in all_of(3):
        gf.build(tmp_path / "run", model, documents, token_batch_size=1, shard=shard)
    merge_run(tmp_path / "run")
    same(everything_in(tmp_path / "run"), everything_in(tmp_path / "whole"), rtol=0)


def test_a_joined_store_is_resumed_as_one(model, documents, tmp_path):
    for shard in all_of(2):
        gf.build(tmp_path, model, documents, gf.project(3), shard=shard)
    merge_run(tmp_path)
    assert gf.build(tmp_path, model, documents, gf.project(3)).resumed == len(documents)


def test_a_shard_that_was_killed_resumes(model, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(run_rows, "SEGMENT_BATCHES", 1)
    how = {"transform": gf.project(3), "token_batch_size": 8}
    gf.build(tmp_path / "whole", model, documents, **how)
    seen = []

    def dies(done):
        seen.append(done)
        if len(seen) > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gf.build(tmp_path / "run", model, documents, shard=Shard(2, 2), progress=dies, **how)
    with pytest.raises(InputError, match=r"shard 1 of 2 of the store of .* is missing"):
        merge_run(tmp_path / "run")
    gf.build(tmp_path / "run", model, documents, shard=Shard(1, 2), **how)
    with pytest.raises(InputError, match=r"shard 2 of 2 of the store of .* is incomplete"):
        merge_run(tmp_path / "run")
    summary = gf.build(tmp_path / "run", model, documents, shard=Shard(2, 2), **how)
    assert 0 < summary.resumed < summary.rows < len(documents)
    merge_run(tmp_path / "run")
    same(everything_in(tmp_path / "run"), everything_in(tmp_path / "whole"))


def test_shards_do_their_own_tokens_only(model, documents, tmp_path):
    done = [[] for _ in all_of(3)]
    for shard, mine in zip(all_of(3), done, strict=True):
        gf.build(tmp_path, model, documents, gf.project(3), shard=shard, progress=mine.append)
    assert [sum(mine) for mine in done] == [16, 14, 15]


def test_shards_without_tokens(model, tmp_path):
    documents = gf.make_documents([[1, 2, 3], [], []])
    for number in (1, 2, 3):
        gf.build(tmp_path / "rows", model, documents, gf.project(3), shard=Shard(number, 3))
    merge_run(tmp_path / "rows")
    with pytest.raises(InputError, match=r"^the rows of shard 2/3 have no tokens: choose fewer shards$"):
        gf.build(
            tmp_path / "tokens", model, documents, gf.project(3), view=View(tokens=True), shard=Shard(2, 3)
        )


@pytest.mark.parametrize("count", range(1, 6))
@pytest.mark.parametrize("by_block", [False, True])
def test_scores_in_shards_are_the_scores(model, documents, tmp_path, count, by_block):
    made = gf.chain(gf.project(3), gf.unit_normalize())
    queries = gf.collect(model, documents.select([2, 5]), made)
    how = {"by_block": by_block, "query_ids": ["a", "b"]}
    score_run(tmp_path / "whole", model, documents, queries, gf.methods.InnerProduct(made, made), **how)
    for shard in all_of(count):
        score_run(
            tmp_path / "run",
            model,
            documents,
            queries,
            gf.methods.InnerProduct(made, made),
            shard=shard,
            **how,
        )
    merge_run(tmp_path / "run")
    same(everything_in(tmp_path / "run", "scores"), everything_in(tmp_path / "whole", "scores"), rtol=1e-6)


def test_shards_scored_against_queries_of_other_names(model, documents, tmp_path):
    for shard, names in zip(all_of(2), ["ab", "ac"], strict=True):
        plain = gf.chain()
        queries = gf.collect(model, documents.select([2, 5]))
        score_run(
            tmp_path,
            model,
            documents,
            queries,
            gf.methods.InnerProduct(plain, plain),
            shard=shard,
            query_ids=[*names],
        )
    refused(
        tmp_path,
        r"^shards 1/2 and 2/2 .* differently \(queries/id.1 is b there and c here\): make one",
    )


# --- curvatures

FOLDS = {
    "second_moment": second_moment, "kfac": kfac, "ekfac": ekfac, "shampoo": shampoo, "eshampoo": eshampoo,
    "tkfac": tkfac,
}  # fmt: skip


def fit_in_shards(run, model, documents, one, transform, count, **how):
    for number in range(1, fold.passes(one) + 1):
        for shard in all_of(count):
            assert hessian_shard(run, model, documents, one, transform, shard=shard, **how) == number
        (joined,) = merge_run(run)
    return joined


@pytest.mark.parametrize("count", mostly_slow(range(1, 6), 3))
@pytest.mark.parametrize("kind", FOLDS)
def test_a_curvature_fitted_in_shards_is_the_curvature(model, documents, tmp_path, kind, count):
    how = {"partitions": 1 + count % 2, "token_batch_size": 8}
    transform = gf.project(3)
    expected = gf.hessian(tmp_path / "whole", model, documents, FOLDS[kind](), transform, **how)
    joined = fit_in_shards(tmp_path / "run", model, documents, FOLDS[kind](), transform, count, **how)
    assert (joined.kind, joined.shards) == ("hessian", count)
    found = gf.runs.load_curvature(tmp_path / "run")
    assert (found.kind, found.rows, list(found)) == (kind, len(documents), list(expected))
    for name, one in found.items():
        torch.testing.assert_close(one.dense(), expected[name].dense(), rtol=1e-9, atol=1e-12)
    with open_store(tmp_path / "run", "hessian") as a, open_store(tmp_path / "whole", "hessian") as b:
        assert a.settings == b.settings
    again = gf.hessian(tmp_path / "run", model, documents, FOLDS[kind](), transform, **how)
    assert again.digest == found.digest


def test_labels_drawn_in_shards_are_those_drawn_in_one(model, documents, tmp_path):
    how = {"labels": "model", "seed": 3}
    expected = gf.hessian(tmp_path / "whole", model, documents, kfac(), **how)
    fit_in_shards(tmp_path / "run", model, documents, kfac(), None, 3, **how)
    for name, one in gf.runs.load_curvature(tmp_path / "run").items():
        torch.testing.assert_close(one.dense(), expected[name].dense(), rtol=1e-9, atol=1e-12)
    drawn = gf.statistics.sample_labels(gf.causal_lm_loss(model), documents, 3)
    part = gf.statistics.sample_labels(gf.causal_lm_loss(model), documents, 3, rows=range(4, 7))
    assert all(torch.equal(part[row]["labels"], drawn[row]["labels"]) for row in range(4, 7))
    assert torch.equal(part[0]["labels"], documents[0]["labels"])


def test_what_is_kept_of_a_shard_is_the_sum(model, documents, tmp_path):
    hessian_shard(tmp_path, model, documents, second_moment(), gf.project(2), shard=Shard(2, 3))
    rows = gf.collect(model, documents, gf.project(2))
    part = shard_rows(documents.lengths, Shard(2, 3))
    there = open_part(shard_run(tmp_path, Shard(2, 3)), "sums")
    assert there.read("rows/count", *there.span) == [len(part)]
    for name, G in rows.items():
        flat = G[part.start : part.stop].flatten(1)
        np.testing.assert_allclose(there.read(f"sums/{name}", *there.span)[0], flat.T @ flat, atol=1e-12)


def test_the_second_pass_waits_for_the_first(model, documents, tmp_path):
    for _ in range(2):  # the first pass, and again: nothing new until all are merged
        for shard in all_of(2):
            assert hessian_shard(tmp_path, model, documents, ekfac(), shard=shard) == 1
    (joined,) = merge_run(tmp_path)
    assert (joined.kind, joined.path.name) == ("basis", "basis.h5")
    with pytest.raises(InputError, match=r"the hessian of .* lies in shards: join them with `merge_run`"):
        open_store(tmp_path, "hessian")
    assert hessian_shard(tmp_path, model, documents, ekfac(), shard=Shard(1, 2)) == 2
    refused(tmp_path, "^shard 2 of 2 of the second sums of .* is missing")
    hessian_shard(tmp_path, model, documents, ekfac(), shard=Shard(2, 2))
    assert merge_run(tmp_path)[0].kind == merge_run(tmp_path)[0].kind == "hessian"


def test_between_the_passes_the_shards_may_go(model, documents, tmp_path):
    expected = gf.hessian(tmp_path / "whole", model, documents, ekfac(), gf.project(3))
    run = tmp_path / "run"
    for count, number in ((3, 1), (2, 2)):
        for shard in all_of(count):
            assert hessian_shard(run, model, documents, ekfac(), gf.project(3), shard=shard) == number
        (joined,) = merge_run(run)
        shutil.rmtree(run / "shards")
    assert (joined.kind, joined.shards) == ("hessian", 2)
    for name, one in gf.runs.load_curvature(run).items():
        torch.testing.assert_close(one.dense(), expected[name].dense(), rtol=1e-9, atol=1e-12)
    assert (
        gf.hessian(run, model, documents, ekfac(), gf.project(3)).digest == gf.runs.load_curvature(run).digest
    )


@pytest.mark.parametrize("basis", ["absent", "another"])
def test_second_sums_alone_need_the_first_pass_that_they_are_of(model, documents, tmp_path, basis):
    run, one = tmp_path / "run", Shard(1, 1)
    for path in (run, tmp_path / "other"):
        data = documents if path == run else documents.select([0, 1, 2])
        hessian_shard(path, model, data, ekfac(), gf.project(3), shard=one)
        merge_run(path)
    hessian_shard(run, model, documents, ekfac(), gf.project(3), shard=one)
    shutil.copytree(run, tmp_path / "kept")
    for path in run.glob("shards/**/*-sums-*.h5"):
        path.unlink()
    for path in [*run.glob("shards/**/sums*"), *run.glob("shards/**/.sums*")]:
        path.unlink()
    (run / "basis.h5").unlink()
    if basis == "another":
        shutil.copy(tmp_path / "other" / "basis.h5", run)
    refused(
        run, "^the second pass of .* was made after a first pass that is not in .*basis.h5: put that back"
    )
    shutil.copy(tmp_path / "kept" / "basis.h5", run)
    assert merge_run(run)[0].kind == "hessian"


def test_a_second_pass_of_another_first_one_is_refused(model, documents, tmp_path):
    fit_in_shards(tmp_path, model, documents, ekfac(), gf.project(3), 2)
    with pytest.raises(
        InputError, match=r"^the first pass in .* was made with other settings \(.*\): give `over"
    ):
        hessian_shard(tmp_path, model, documents, ekfac(), gf.project(2), shard=Shard(1, 2))
    for shard in all_of(2):
        how = {"shard": shard, "overwrite": True}
        assert hessian_shard(tmp_path, model, documents, ekfac(), gf.project(2), **how) == 1
    refused(tmp_path, "was made with other settings")
    assert merge_run(tmp_path, overwrite=True)[0].kind == "basis"
    for shard in all_of(2):
        assert hessian_shard(tmp_path, model, documents, ekfac(), gf.project(2), shard=shard) == 2
    assert merge_run(tmp_path, overwrite=True)[0].kind == "hessian"
    expected = gf.hessian(tmp_path / "whole", model, documents, ekfac(), gf.project(2))
    for name, one in gf.runs.load_curvature(tmp_path).items():
        torch.testing.assert_close(one.dense(), expected[name].dense(), rtol=1e-9, atol=1e-12)


def test_second_sums_that_were_copied_beside_another_first_pass_are_refused(model, documents, tmp_path):
    fit_in_shards(tmp_path / "a", model, documents, ekfac(), gf.project(3), 2)
    for shard in all_of(2):
        hessian_shard(tmp_path / "b", model, documents, ekfac(), gf.project(2), shard=shard)
    for path in (tmp_path / "a").glob("shards/**/*second_sums*"):
        shutil.copy(path, tmp_path / "b" / path.relative_to(tmp_path / "a"))
    words = "made after another first pass: run all shards again with `overwrite=True`, then merge"
    refused(tmp_path / "b", words)
    for shard in all_of(2):
        how = {"shard": shard, "overwrite": True}
        assert hessian_shard(tmp_path / "b", model, documents, ekfac(), gf.project(2), **how) == 1
    assert merge_run(tmp_path / "b")[0].kind == "basis"


def test_for_the_second_pass_another_machine_needs_the_basis_alone(model, documents, tmp_path):
    fit_in_shards(tmp_path / "run", model, documents, ekfac(), gf.project(3), 2)
    for shard in all_of(2):
        (there := tmp_path / f"node{shard.number}").mkdir()
        shutil.copy(tmp_path / "run" / "basis.h5", there)
        assert hessian_shard(there, model, documents, ekfac(), gf.project(3), shard=shard) == 2
        mine, theirs = (open_part(shard_run(run, shard), "second_sums") for run in (there, tmp_path / "run"))
        for name in theirs.names():
            np.testing.assert_array_equal(mine.read(name, *mine.span), theirs.read(name, *mine.span))


def test_sums_that_were_made_again_replace_a_curvature_only_when_told(model, documents, tmp_path):
    for shard in all_of(2):
        hessian_shard(tmp_path, model, documents, kfac(), gf.project(3), shard=shard)
    merge_run(tmp_path)
    before = gf.runs.load_curvature(tmp_path).digest
    part = open_part(shard_run(tmp_path, Shard(1, 2)), "sums")
    sums = {name: part.read(name, *part.span) for name in part.names()}
    sums = {name: 2 * array if name.startswith("sums/") else array for name, array in sums.items()}
    where = shard_run(tmp_path, Shard(1, 2))
    with open_writer(where, "sums", part.settings, part.rows, True, part=part.span) as writer:
        writer.write(*part.span, sums)
        writer.finish()
    refused(
        tmp_path, "^the hessian in .* is not of the sums of its shards, which were made again: give `over"
    )
    merge_run(tmp_path, overwrite=True)
    assert gf.runs.load_curvature(tmp_path).digest != before


def test_a_curvature_fitted_without_shards_is_replaced_only_when_told(model, documents, tmp_path):
    gf.hessian(tmp_path, model, documents, kfac(), gf.project(3))
    for shard in all_of(2):
        hessian_shard(tmp_path, model, documents, kfac(), gf.project(3), shard=shard)
    refused(
        tmp_path, "^the curvature in .* is of a run without shards: give `overwrite=True` to take that of the"
    )
    assert merge_run(tmp_path, overwrite=True)[0].kind == "hessian"


def test_sums_of_other_rows_are_refused(model, documents, tmp_path):
    for shard in all_of(2):
        hessian_shard(tmp_path, model, documents, kfac(), shard=shard)
    with open_writer(shard_run(tmp_path, Shard(2, 2)), "sums", {}, 2, True, part=(1, 2)) as writer:
        writer.write(1, 2, {"rows/count": np.ones(1)})
        writer.finish()
    refused(tmp_path, "^shards 1/2 and 2/2 of the sums of .* were made differently")


def test_a_fold_of_ones_own_has_no_shards(model, documents, tmp_path):
    with pytest.raises(
        InputError, match=r"is not fitted in shards: choose one of .*kfac.*, or leave out the shard$"
    ):
        hessian_shard(tmp_path, model, documents, gf.statistics.mean(), shard=Shard(1, 2))
    assert not list(tmp_path.iterdir())
