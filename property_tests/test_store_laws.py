"""Laws of the store: what went in comes out, however the rows were cut and however often a run resumed."""

import tempfile
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gradfn.store import differing, open_store, open_writer

DTYPES = st.sampled_from(["f2", "f4", "f8", "i4", "i8", "u1", "?", ">f4", "c8"])
NAMES = st.sampled_from(["gradients/a.b", "gradients/a", "rows/id", "rows/loss", "scores", "grüße/日本"])
TEXTS = st.text(st.characters(exclude_categories=())).map(lambda text: text.rstrip("\0"))
KINDS = st.sampled_from(["store", "scores"])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=8,
)
SETTINGS = st.dictionaries(st.text("ab", max_size=2), JSON, max_size=3)


def numbers(rows):
    shapes = hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3)
    return st.tuples(DTYPES, shapes).flatmap(lambda made: hnp.arrays(made[0], (rows, *made[1])))


@st.composite
def tables(draw):
    """Rows of a few named arrays: `(rows, {name: array or list of strings})`."""
    rows = draw(st.integers(1, 9))
    values = numbers(rows) | st.lists(TEXTS, min_size=rows, max_size=rows)
    return rows, draw(st.dictionaries(NAMES, values, min_size=1, max_size=3))


def cuts(rows):
    """Any way to cut the rows into slices, in any order."""
    inner = st.sets(st.integers(1, rows - 1)) if rows > 1 else st.just(set())
    edges = inner.map(lambda found: sorted({0, rows, *found}))
    return edges.map(lambda edge: list(pairwise(edge))).flatmap(st.permutations)


def same(a, b):
    """Equal bit for bit, NaN included; strings by value."""
    a, b = (value if isinstance(value, np.ndarray) else np.array(value, dtype=object) for value in (a, b))
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return list(a) == list(b) if a.dtype == object else a.tobytes() == b.tobytes()


def part(arrays, start, stop):
    return {name: values[start:stop] for name, values in arrays.items()}


def write(writer, arrays, slices):
    for start, stop in slices:
        writer.write(start, stop, part(arrays, start, stop))


@settings(deadline=None, max_examples=40)
@given(data=st.data(), table=tables(), kind=KINDS, made=SETTINGS)
def test_any_slicing_gives_back_what_was_written(data, table, kind, made):
    rows, arrays = table
    fixed = {f"fixed/{name}": values for name, values in arrays.items()}
    with tempfile.TemporaryDirectory() as run:
        with open_writer(run, kind, made, rows) as writer:
            write(writer, arrays, data.draw(cuts(rows)))
            writer.finish(fixed)
        with open_store(run, kind) as store:
            assert store.names() == list(arrays)
            assert differing(store.settings, made) == {}
            assert all(same(store.read(name), values) for name, values in arrays.items())
            assert all(same(store.fixed(name), values) for name, values in fixed.items())
            start, stop = sorted(data.draw(st.tuples(*[st.integers(0, rows)] * 2)))
            for name, values in part(arrays, start, stop).items():
                assert same(store.read(name, start, stop), values)


@settings(deadline=None, max_examples=30)
@given(data=st.data(), table=tables(), kind=KINDS)
def test_resumed_is_uninterrupted(data, table, kind):
    rows, arrays = table
    with tempfile.TemporaryDirectory() as run:
        for _ in range(data.draw(st.integers(0, 3))):
            with open_writer(run, kind, {}, rows) as writer:
                missing = writer.missing(data.draw(cuts(rows)))
                write(writer, arrays, missing[: data.draw(st.integers(0, len(missing)))])
        with open_writer(run, kind, {}, rows) as writer:
            write(writer, arrays, writer.missing(data.draw(cuts(rows))))
            writer.finish()
        store = open_store(run, kind)
        assert all(same(store.read(name), values) for name, values in arrays.items())
        step = data.draw(st.integers(1, rows + 1))
        for start, stop, chunk in store.chunks(list(arrays), step):
            assert all(same(chunk[name], values) for name, values in part(arrays, start, stop).items())


@settings(deadline=None, max_examples=40)
@given(data=st.data(), rows=st.integers(1, 9))
def test_missing_and_done_are_a_partition(data, rows):
    with tempfile.TemporaryDirectory() as run, open_writer(run, "store", {}, rows) as writer:
        first = data.draw(cuts(rows))
        write(writer, {"x": np.zeros(rows)}, first[: data.draw(st.integers(0, len(first)))])
        asked = data.draw(cuts(rows))
        missing = writer.missing(asked)
        assert sorted(row for span in [*writer.done, *missing] for row in range(*span)) == list(range(rows))
        assert all(any(a <= start and stop <= b for a, b in asked) for start, stop in missing)


@given(a=SETTINGS, b=SETTINGS)
def test_settings_differ_from_others_both_ways_and_never_from_themselves(a, b):
    assert differing(a, a) == {}
    assert differing(b, a) == {key: (there, here) for key, (here, there) in differing(a, b).items()}
    if "nan" not in repr((a, b)):
        assert bool(differing(a, b)) == (a != b)
