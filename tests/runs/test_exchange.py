"""Stores of another program's gradients, and files for other programs."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import language_model

import gradfn as gf
from gradfn.data import make_documents
from gradfn.errors import InputError
from gradfn.methods.inner_product import InnerProduct
from gradfn.runs import Faiss, exchange, find
from gradfn.runs.exchange import export_gradients, import_bergson
from gradfn.runs.queries import stored_queries
from gradfn.store import open_writer
from gradfn.transforms import chain

SIZES = {"layers.0.mlp": 6, "layers.0.attention": 4, "lm_head": 5}
PROCESSOR = "projection_dim: 2\nprojection_type: rademacher\nprojection_seed: null\n"
CONFIG = """steps:
- {command}:
    index_cfg:
      model: {model}
      revision: null
      precision: fp32
    preprocess_cfg:
      unit_normalize: {unit}
metadata:
  bergson_version: 2.5.1
"""


def numbers(rows, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, sum(SIZES.values()))).astype(np.float32)


def index(path, rows=20, seed=0, dtype="float32", unit=False, model="gpt2", command="build", **changes):
    """What Bergson 2.5.1 writes: a raw matrix, and files that say what it is."""
    path.mkdir()
    values = numbers(rows, seed)
    if dtype == "bfloat16":
        (path / "gradients.bin").write_bytes((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    else:
        (path / "gradients.bin").write_bytes(values.astype(dtype).tobytes())
    info = {
        "attribute_tokens": False,
        "num_items": rows,
        "num_grads": rows,
        "grad_sizes": SIZES,
        "base_dtype": dtype,
    }
    (path / "info.json").write_text(json.dumps({**info, **changes}))
    (path / "processor_config.yaml").write_text(PROCESSOR)
    (path / "config.yaml").write_text(CONFIG.format(command=command, model=model, unit=str(unit).lower()))
    return path


@pytest.mark.parametrize(
    ("dtype", "bits"), [("float32", 0), ("float16", 1e-3), ("bfloat16", 1e-2), ("float64", 0)]
)
def test_an_index_becomes_a_store(tmp_path, dtype, bits, monkeypatch):
    monkeypatch.setattr(exchange, "SEGMENT_BYTES", 7 * 15 * 2)  # a few rows a segment
    import_bergson(index(tmp_path / "i", dtype=dtype), tmp_path / "run")
    want, start = numbers(20), 0
    with gf.open_store(tmp_path / "run") as store:
        assert len(store.files()) > 1
        assert store.names("gradients") == [f"gradients/{name}" for name in SIZES]
        for name, size in SIZES.items():
            got = store.read(f"gradients/{name}")
            assert got.dtype == ("float32" if dtype == "bfloat16" else dtype)
            np.testing.assert_allclose(got[:, 0], want[:, start : start + size], rtol=bits, atol=bits)
            start += size
        assert store.read("rows/id").tolist() == [str(row) for row in range(20)]
        assert store.settings["model"]["path"] == "gpt2"


def test_rows_have_the_names_of_the_dataset_beside_them(tmp_path):
    from datasets import Dataset

    path = index(tmp_path / "i", 3)
    Dataset.from_dict({"id": [7, 8, 9], "text": ["a", "b", "c"]}).save_to_disk(str(path / "data.hf"))
    import_bergson(path, tmp_path / "run")
    with gf.open_store(tmp_path / "run") as store:
        assert store.read("rows/id").tolist() == ["7", "8", "9"]
        assert store.read("rows/text").tolist() == ["a", "b", "c"]


@pytest.mark.parametrize("unit", [False, True])
def test_an_imported_store_is_searched_for_imported_queries(tmp_path, unit):
    import_bergson(index(tmp_path / "i"), tmp_path / "rows")
    import_bergson(index(tmp_path / "j", 3, seed=1, command="reduce"), tmp_path / "asked")
    rows, asked = numbers(20).astype(np.float64), numbers(3, 1).astype(np.float64)
    if unit:
        rows, asked = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (rows, asked))
    want = asked @ rows.T
    tail = [gf.unit_normalize()] if unit else []
    with gf.open_store(tmp_path / "rows") as store:
        made = exchange.Imported(store.settings["transform"]["chain"][0])
        method = InnerProduct(chain(*tail), chain(made, *tail))
        queries, method, _ = stored_queries(str(tmp_path / "asked"), method, store.settings)
        for how in (None, Faiss("Flat")):
            best, worst = find(store, method, queries, 4, index=how)
            assert best.rows.tolist() == np.argsort(-want)[:, :4].tolist()
            assert worst.rows.tolist() == np.argsort(want)[:, :4].tolist()
            np.testing.assert_allclose(best.scores, -np.sort(-want)[:, :4], rtol=1e-5)


def test_queries_of_another_model_or_projection_are_refused(tmp_path):
    import_bergson(index(tmp_path / "i"), tmp_path / "rows")
    import_bergson(index(tmp_path / "j", model="gpt3"), tmp_path / "other")
    path = index(tmp_path / "k")
    (path / "processor_config.yaml").write_text(PROCESSOR.replace("2", "4"))
    import_bergson(path, tmp_path / "wider")
    with gf.open_store(tmp_path / "rows") as store:
        made = exchange.Imported(store.settings["transform"]["chain"][0])
        for name, words in (("other", "model is gpt3"), ("wider", "projection_dim is 4 there and 2 here")):
            with pytest.raises(InputError, match=words):
                stored_queries(str(tmp_path / name), InnerProduct(chain(), chain(made)), store.settings)
    with pytest.raises(InputError, match="made by bergson, whose projections are its own"):
        made({"a": torch.ones(1, 2, 2)})


def test_unit_rows_are_told(tmp_path):
    import_bergson(index(tmp_path / "i", unit=True), tmp_path / "rows")
    with gf.open_store(tmp_path / "rows") as store:
        stages = store.settings["transform"]["chain"]
    assert [stage["transform"] for stage in stages] == ["Imported", "UnitNormalize"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: (path / "gradients.bin").unlink(), "is no index of Bergson"),
        (
            lambda path: (path / "gradients.bin").write_bytes(b"123"),
            "has 3 bytes, and 20 rows of 15 numbers would",
        ),
        (lambda path: (path / "info.json").write_text("{"), "does not say num_grads"),
        (lambda path: (path / "info.json").write_text("[]"), "does not say num_grads"),
        (lambda path: (path / "config.yaml").write_text("a: [b"), "is no YAML file of settings"),
    ],
)
def test_what_is_no_index_is_refused(tmp_path, change, words):
    change(index(tmp_path / "i"))
    with pytest.raises(InputError, match=words):
        import_bergson(tmp_path / "i", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_index_of_tokens_or_of_other_numbers_is_refused(tmp_path):
    with pytest.raises(InputError, match="an index of tokens"):
        import_bergson(index(tmp_path / "i", attribute_tokens=True), tmp_path / "run")
    with pytest.raises(InputError, match="has numbers of int8"):
        import_bergson(index(tmp_path / "j", base_dtype="int8"), tmp_path / "run")


# --- to files

ROWS = make_documents(
    [[1, 2, 3, 4], [5, 6, 7], [8, 9, 3, 2, 1]], ids=["a", "b", "c"], texts=["x", "y\ud800", ""]
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    run = tmp_path_factory.mktemp("store")
    gf.build(run, language_model("llama").float(), ROWS, gf.project(2))
    with gf.open_store(run) as store:
        yield store


def everything(store):
    return {name.removeprefix("gradients/"): store.read(name) for name in store.names("gradients")}


@pytest.mark.parametrize("memory", [None, 1])
def test_a_matrix_has_the_blocks_side_by_side(store, tmp_path, memory):
    path = export_gradients(store.path, tmp_path / "g.npy", memory=memory)
    matrix, about = np.load(path, mmap_mode="r"), json.loads((tmp_path / "g.json").read_text())
    assert about["ids"] == ["a", "b", "c"]
    for name, values in everything(store).items():
        first, last = about["blocks"][name]["columns"]
        shape = about["blocks"][name]["shape"]
        np.testing.assert_array_equal(matrix[:, first:last].reshape(3, *shape), values)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["g.json", "g.npy"]


@pytest.mark.parametrize("memory", [None, 1])
def test_a_table_has_a_column_for_each_block(store, tmp_path, memory):
    table = pq.read_table(export_gradients(store.path, tmp_path / "g.parquet", memory=memory))
    assert table["id"].to_pylist() == ["a", "b", "c"]
    assert table["text"].to_pylist() == ["x", "y?", ""]
    for name, values in everything(store).items():
        np.testing.assert_array_equal(np.array(table[f"gradients/{name}"].to_pylist()), values.reshape(3, -1))


def test_a_matrix_of_16_bits_stays_so_and_of_several_precisions_is_refused(tmp_path):
    for name, other in (("same", np.float16), ("mixed", np.float32)):
        with open_writer(tmp_path / name, "store", {"transform": {"chain": []}}, 2) as writer:
            blocks = {"gradients/a": np.ones((2, 2), np.float16), "gradients/b": np.ones((2, 1), other)}
            writer.write(0, 2, blocks)
            writer.finish()
    assert np.load(export_gradients(tmp_path / "same", tmp_path / "g.npy")).dtype == np.float16
    with pytest.raises(InputError, match=r"differ in precision, and a matrix has one: write \.parquet"):
        export_gradients(tmp_path / "mixed", tmp_path / "h.npy")
    assert not [file for file in tmp_path.iterdir() if "h.npy" in file.name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("g.txt", r"should end in \.npy or \.parquet"),
        ("there.npy", r"there\.npy exists: give another name, or `overwrite=True`"),
        ("no/g.npy", "is no folder"),
    ],
)
def test_files_that_cannot_be_written_are_refused(store, tmp_path, name, words):
    (tmp_path / "there.npy").write_text("")
    with pytest.raises(InputError, match=words):
        export_gradients(store.path, tmp_path / name)
    export_gradients(store.path, tmp_path / "there.npy", overwrite=True)


def test_a_block_is_read_without_the_others(tmp_path):
    """Each array of a segment lies by itself, so damage to one is none of the other."""
    generator = np.random.default_rng(0)
    rows = {f"gradients/{name}": generator.standard_normal((50, 40)) for name in "ab"}
    with open_writer(tmp_path, "store", {"transform": {"chain": []}}, 50) as writer:
        writer.write(0, 50, rows)
        writer.finish()
    (segment,) = (tmp_path / "segments").iterdir()
    content = bytearray(segment.read_bytes())
    place = content.find(rows["gradients/a"][:2].tobytes())
    content[place + 8] ^= 1
    segment.write_bytes(content)
    with gf.open_store(tmp_path) as store:
        np.testing.assert_array_equal(store.read("gradients/b", 10, 12), rows["gradients/b"][10:12])
        (chunk,) = [part for start, _, part in store.chunks(["gradients/b"], 30) if start == 30]
        np.testing.assert_array_equal(chunk["gradients/b"], rows["gradients/b"][30:])
        with pytest.raises(InputError, match="is damaged"):
            store.read("gradients/a", 10, 12)
