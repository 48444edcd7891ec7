"""The rows that score highest and lowest, found by an index of FAISS, are those of the exact search."""

import json

import numpy as np
import pytest
import torch

import gradfn as gf
from gradfn.errors import InputError
from gradfn.linalg.spectrum import Damping, Spectrum
from gradfn.methods.inner_product import InnerProduct
from gradfn.runs.nearest import Faiss, find, open_index
from gradfn.runs.scores import stored_scores
from gradfn.scores import extremes, recall
from gradfn.store import open_writer
from gradfn.transforms import chain

ROWS, SHAPES = 600, {"b.mlp": (4, 6), "a.attention": (3, 5)}


def normal(seed, rows, dtype=np.float32):
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal((rows, *shape)).astype(dtype) for name, shape in SHAPES.items()}


def spectra():
    """A curvature of each block, one with Kronecker structure and one without."""
    generator = torch.Generator().manual_seed(0)

    def rotation(n):
        return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]

    left, right = (rotation(n) for n in SHAPES["b.mlp"])
    values = torch.rand(4, 6, generator=generator, dtype=torch.float64) * 10
    flat = torch.rand(1, 15, generator=generator, dtype=torch.float64)
    return {
        "b.mlp": Spectrum(left.float(), right.float(), values),
        "a.attention": Spectrum(None, rotation(15).float(), flat),
    }


H, TWO = spectra(), (Damping(0.1), Damping(1.0))
METHODS = {
    "dot": InnerProduct(chain(), chain()),
    "cosine": InnerProduct(chain(), chain(), norm="cosine"),
    "unit rows": InnerProduct(chain(gf.unit_normalize()), chain(gf.unit_normalize())),
    "curvature": InnerProduct(chain(), chain(), H, TWO),
    "curvature, cosine": InnerProduct(chain(), chain(), H, (Damping(0.3),), "cosine"),
    "relative": InnerProduct(chain(), chain(), H, (None,), "relative"),
    "relative without a curvature": InnerProduct(chain(), chain(), norm="relative"),
    "solved": InnerProduct(
        chain(), chain(), norm="cosine", solve=lambda q: {n: G.cumsum(-1) for n, G in q.items()}
    ),
}
QUERIES = {name: torch.from_numpy(values) for name, values in reversed(normal(1, 5).items())}


def write(run, rows=ROWS, seed=0, dtype=np.float32, step=200):
    every = normal(seed, rows, dtype)
    with open_writer(run, "store", {"transform": {"chain": []}}, rows, overwrite=True) as writer:
        for start in range(0, rows, step):
            part = {f"gradients/{name}": values[start : start + step] for name, values in every.items()}
            writer.write(start, min(start + step, rows), part)
        writer.finish()
    return gf.open_store(run)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write(tmp_path_factory.mktemp("store"))


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def method(request):
    return request.param


def folders(store):
    return sorted(path.name for path in store.path.parent.glob("*faiss-*"))


def same(got, want):
    for best, expected in zip(got, want, strict=True):
        torch.testing.assert_close(best.scores, expected.scores, rtol=1e-4, atol=1e-4)
        # Rows with scores that differ by no more than rounding may have changed places.
        assert (best.rows == expected.rows).double().mean() > 0.95


def test_scores_are_inner_products_of_the_sides(method):
    rows = {name: torch.from_numpy(values) for name, values in normal(2, 7).items()}
    one, other = method.sides()
    row, query = one(rows), other(QUERIES)
    plain = sum(torch.einsum("roi,qoi->rq", row[name].double(), query[name].double()) for name in SHAPES)
    want = method.against(QUERIES)(rows)
    torch.testing.assert_close(plain.float(), want, rtol=1e-4, atol=1e-5)


def test_an_index_of_all_rows_finds_what_the_exact_search_finds(store, method):
    want = extremes(stored_scores(store, method.against(QUERIES)), 10)
    same(find(store, method, QUERIES, 10), want)
    same(find(store, method, QUERIES, 10, index=Faiss("Flat")), want)


@pytest.mark.parametrize("factory", ["IVF8,Flat", "SQfp16", "IVF8,SQfp16", "OPQ3_39,SQfp16", "HNSW32"])
def test_kinds_of_index(store, factory):
    nprobe = {"SQfp16": None, "OPQ3_39,SQfp16": None, "HNSW32": 600}.get(factory, 8)
    want = find(store, METHODS["cosine"], QUERIES, 10)
    got = find(store, METHODS["cosine"], QUERIES, 10, index=Faiss(factory, nprobe))
    for best, expected in zip(got, want, strict=True):
        torch.testing.assert_close(best.scores, expected.scores, rtol=1e-2, atol=1e-3)
        assert recall(best, expected) > 0.95


def test_more_effort_finds_more(store):
    want, _ = find(store, METHODS["dot"], QUERIES, 20)
    found = [
        recall(find(store, METHODS["dot"], QUERIES, 20, index=Faiss("IVF40,Flat", n))[0], want)
        for n in (1, 6, 40)
    ]
    assert found[0] < found[1] < found[2] == 1


def test_codes_of_rows_give_about_their_scores(store):
    exact, _ = find(store, METHODS["cosine"], QUERIES, 50)
    got, _ = find(store, METHODS["cosine"], QUERIES, 50, index=Faiss("IVF4,PQ13", 4))
    assert 0.3 < recall(got, exact) < 1


def test_places_without_a_row_score_infinitely_badly(store):
    proponents, opponents = find(store, METHODS["dot"], QUERIES, 300, index=Faiss("IVF60,Flat", 1))
    for best, worst in ((proponents, -torch.inf), (opponents, torch.inf)):
        missing = best.rows < 0
        assert missing.any()
        assert (best.scores[missing] == worst).all()
        assert best.scores[~missing].isfinite().all()


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat"])
def test_an_index_in_parts_is_the_same(tmp_path, factory):
    store, want = write(tmp_path), find(gf.open_store(tmp_path), METHODS["cosine"], QUERIES, 10)
    index = Faiss(factory, 8 if "IVF" in factory else None)
    same(find(store, METHODS["cosine"], QUERIES, 10, index=index, memory=39 * 8 * 110), want)
    (folder,) = folders(store)
    files = json.loads((tmp_path / folder / "index.json").read_text())["files"]
    assert len(files) >= 3


def test_an_index_is_made_once(tmp_path):
    store, done = write(tmp_path), []
    for _ in range(2):
        find(store, METHODS["dot"], QUERIES, 3, index=Faiss("IVF8,Flat"), progress=done.append)
    assert sum(done) == ROWS
    find(store, METHODS["curvature"], QUERIES, 3, index=Faiss("IVF8,Flat", 3), progress=done.append)
    assert sum(done) == ROWS  # a curvature of queries alone leaves the rows as they are
    find(store, METHODS["curvature, cosine"], QUERIES, 3, index=Faiss("IVF8,Flat"), progress=done.append)
    find(store, METHODS["dot"], QUERIES, 3, index=Faiss("Flat"), progress=done.append)
    find(store, METHODS["dot"], QUERIES, 3, index=Faiss("IVF8,Flat", seed=1), progress=done.append)
    assert (sum(done), len(folders(store))) == (4 * ROWS, 4)


@pytest.mark.parametrize("changed", [{"rows": 800}, {"seed": 5}], ids=["more rows", "other rows"])
def test_an_index_of_other_rows_is_replaced(tmp_path, changed):
    before = find(write(tmp_path), METHODS["dot"], QUERIES, 10, index=Faiss("Flat"))
    store = write(tmp_path, **changed)
    after = find(store, METHODS["dot"], QUERIES, 10, index=Faiss("Flat"))
    same(after, find(store, METHODS["dot"], QUERIES, 10))
    assert not torch.equal(after[0].rows, before[0].rows)
    assert len(folders(store)) == 1


def test_what_a_killed_process_left_is_made_again(tmp_path):
    store = write(tmp_path)
    want = find(store, METHODS["dot"], QUERIES, 10, index=Faiss("Flat"))
    (name,) = folders(store)
    part = tmp_path / name / "0.faiss"
    part.write_bytes(part.read_bytes()[:100])
    (tmp_path / f".{name}.tmp").mkdir()
    (tmp_path / f".{name}.tmp" / "0.faiss").write_bytes(b"half")
    same(find(store, METHODS["dot"], QUERIES, 10, index=Faiss("Flat")), want)
    assert folders(store) == [name]


def test_a_part_that_is_no_index_is_told_in_a_sentence(tmp_path):
    store = write(tmp_path)
    path = open_index(store, METHODS["dot"], Faiss("Flat")).path
    (path / "0.faiss").write_bytes(b"x" * (path / "0.faiss").stat().st_size)
    with pytest.raises(InputError, match=r"0\.faiss is damaged \(.+\): delete "):
        open_index(store, METHODS["dot"], Faiss("Flat"))


def test_links_are_refused(tmp_path):
    store = write(tmp_path / "run")
    path = open_index(store, METHODS["dot"], Faiss("Flat")).path
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a symbolic link"):
        open_index(store, METHODS["dot"], Faiss("Flat"))


def test_rows_of_16_bits(tmp_path):
    store = write(tmp_path, dtype=np.float16)
    want = find(store, METHODS["cosine"], QUERIES, 10)
    same(find(store, METHODS["cosine"], QUERIES, 10, index=Faiss("Flat")), want)


def test_queries_of_other_layers_are_refused(store):
    with pytest.raises(
        InputError, match=r"the queries have the blocks b\.mlp, and the rows a\.attention, b\.mlp"
    ):
        find(store, METHODS["dot"], {"b.mlp": QUERIES["b.mlp"]}, 3, index=Faiss("Flat"))


@pytest.mark.parametrize(
    ("index", "name", "words"),
    [
        (Faiss("nonsense"), "dot", "FAISS has no index 'nonsense' of inner products of 39 numbers"),
        (Faiss("LSH"), "dot", "FAISS has no index 'LSH'"),
        (Faiss("IVF8,PQ5"), "dot", "FAISS has no index 'IVF8,PQ5' of inner products of 39 numbers"),
        (Faiss("PCA16,Flat"), "dot", "begins with a PCAMatrix, which changes inner products"),
        (Faiss("L2norm,Flat"), "dot", "begins with a NormalizationTransform, which changes inner products"),
        (Faiss("NSG16"), "dot", "takes all rows at once, and a store is read in parts"),
        (Faiss("IDMap,Flat"), "dot", "takes all rows at once"),
        (Faiss("IVF601,Flat"), "dot", "has 601 cells for 600 rows: give fewer cells than rows, or Flat"),
        (Faiss("Flat", 4), "dot", "this index compares all rows: leave it out"),
        (Faiss("Flat"), "two", "are others for each damping: give one `damping`"),
    ],
)
def test_what_has_no_index_is_refused_before_any_work(tmp_path, store, index, name, words):
    methods = {**METHODS, "two": InnerProduct(chain(), chain(), H, TWO, "cosine")}
    before = folders(store)
    with pytest.raises(InputError, match=words):
        find(store, methods[name], QUERIES, 3, index=index)
    assert folders(store) == before


def test_an_effort_of_nothing_is_refused():
    with pytest.raises(InputError, match="`nprobe` must be 1 or more, not 0"):
        Faiss("Flat", 0)
