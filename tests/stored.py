"""A run of a dozen rows, written and read by the tests of the store."""

import select
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest

from gradfn.errors import InputError
from gradfn.store import open_writer

ROWS = 12
SETTINGS = {"transform": [{"project": {"dim": 3, "seed": 0}}], "model": "tiny", "damping": 0.1}
TEXTS = [
    "plain",
    "",
    "naïve café",
    "日本語",
    "🙂",
    "a\0b",
    "\ud83d",
    " spaces ",
    "line\nbreak",
    "x" * 300,
    "0",
    "é",
]


def rows_of(start, stop):
    """The arrays of some rows, a function of the row numbers alone."""
    rows = np.arange(start, stop)
    return {
        "gradients/layers.0.mlp": (rows[:, None, None] + np.arange(6).reshape(2, 3) / 10).astype(np.float32),
        "gradients/layers.0": -rows[:, None] * np.ones(4),
        "rows/length": rows * 7,
        "rows/id": [TEXTS[row % len(TEXTS)] for row in rows],
    }


def slices(step, rows=ROWS):
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def write(run, cuts=None, kind="store", settings=SETTINGS, rows=ROWS, index_arrays=None, **options):
    with open_writer(run, kind, settings, rows, **options) as writer:
        for start, stop in writer.missing(cuts or slices(5, rows)):
            writer.write(start, stop, rows_of(start, stop))
        return writer.finish(index_arrays)


def assert_holds_rows(store, rows=ROWS):
    expected = rows_of(0, rows)
    assert store.names() == list(expected)
    for name, values in expected.items():
        got = store.read(name)
        assert list(got) == values if isinstance(values, list) else np.array_equal(got, values)
        assert got.dtype == np.asarray(values, dtype=object if isinstance(values, list) else None).dtype


def one_sentence(error, *words):
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text
    return text


def files(run):
    return sorted(str(path.relative_to(run)) for path in Path(run).rglob("*") if path.is_file())


def segment(run, start, stop, kind="store"):
    return run / "segments" / f"{kind}-{start:010d}-{stop:010d}.h5"


def start(code, run):
    """Run `code` in a process of its own, up to where it says ready()."""
    setup = """
        import os, sys, time
        sys.path[:0] = sys.argv[2:]
        from pathlib import Path
        import numpy as np
        from gradfn.store import open_writer
        import test_writer
        run = Path(sys.argv[1])
        def ready():
            print("ready", flush=True)
    """
    here = Path(__file__).resolve().parent
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(setup) + textwrap.dedent(code), run, here, here / "store"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    if select.select([child.stdout], [], [], 60)[0] and child.stdout.readline() == "ready\n":
        return child
    child.kill()
    pytest.fail(child.communicate()[1])


def finished(child):
    stdout, stderr = child.communicate(timeout=60)
    assert child.returncode == 0, stderr
    return stdout


def refusal(call, *args):
    try:
        call(*args)
    except InputError as error:
        return str(error)
    return ""


def damage(path, change):
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content))


def flip(path):
    """Change a bit in the largest array of a file."""
    with h5py.File(path) as file:
        sizes = {}
        file.visititems(
            lambda name, one: sizes.update({name: one.nbytes}) if hasattr(one, "nbytes") else None
        )
        start, size = place_of(file[max(sizes, key=lambda name: sizes[name])])
    content = bytearray(path.read_bytes())
    content[start + size // 2] ^= 4
    path.write_bytes(content)


def place_of(dataset):
    """The first byte of an array in its file, and how many bytes there are; of texts, those of a chunk."""
    if dataset.chunks is None:
        return dataset.id.get_offset(), dataset.nbytes
    chunk = dataset.id.get_chunk_info(0)
    return chunk.byte_offset, chunk.size
