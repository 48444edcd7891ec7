"""`gradfn verify --repair`: what is damaged is removed, and only it is made again, with the same bits."""

import hashlib
import shlex

import numpy as np
import pytest
from stored import flip

from gradfn.store import open_store, open_writer

ASK = ("--query", "The capital of Peru is", "--completion", " Lima")
RETRAIN = (
    "--query",
    "The capital of Peru is Lima",
    "--subsets",
    4,
    "--seeds",
    1,
    "--epochs",
    1,
    "--batch-size",
    6,
)
STEPS = ("--epochs", 3, "--batch-size", 6)


@pytest.fixture
def base(model, corpus):
    return "--model", model, "--dataset", corpus


def state(run):
    """The files of a run, but locks and what says when and how long."""
    files = (path for path in run.rglob("*") if path.is_file() and path.suffix not in (".lock", ".csv"))
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def arrays(run, kind):
    store = open_store(run, kind)
    names = [name for name in store.names() if name != "steps/seconds"]
    found = {name: store.read(name).tolist() for name in names}
    return str({**found, **{name: store.index_array(name).tolist() for name in store.header.index_arrays}})


def checkpoints(run):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in run.glob("checkpoint-*/*")}


def mended(ok, command, run, kind, damaged, gone=()):
    """Repair a run and make it again; what was not damaged is as it was."""
    said = ok("verify", run, "--repair")
    for path in gone or [damaged]:
        assert f"removed {path}" in said
        assert not path.exists()
    again = said.split("now run gradfn ")[1].split(", which makes only what was removed")[0]
    return shlex.split(again)


KINDS = [("build", "store", ("--token-batch-size", 1)), ("score", "scores", (*ASK, "--token-batch-size", 1)),
         ("hessian", "hessian", ()), ("retrain", "truth", RETRAIN), ("train", "training", STEPS)]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "more"), KINDS, ids=[name for name, *_ in KINDS])
def test_only_what_was_damaged_is_made_again(ok, command, base, tmp_path, name, kind, more):
    run = tmp_path / "run"
    ok(name, run, *base, *more)
    before, held = state(run), arrays(run, kind)
    segments = sorted(run.glob("segments/*.h5"))
    for damaged in (segments[len(segments) // 2], run / f"{kind}.h5"):
        damaged.write_bytes(damaged.read_bytes()[:-5])
        assert str(damaged) in command("verify", run).err
        assert mended(ok, command, run, kind, damaged)[0] == name
        assert {path for path in before if not path.exists()} == {damaged}
        assert {path: was for path, was in state(run).items() if before[path] != was} == {}
        said = ok("rerun", run)
        assert "nothing is computed again" not in said or kind == "scores"
        assert arrays(run, kind) == held
        assert "all as written" in " ".join(ok("verify", run).split())
        for path in set(segments) & {*before} - {damaged}:
            assert path.stat().st_mtime_ns == before[path][0]
        before = state(run)


@pytest.mark.parametrize(
    ("step", "name"), [(4, "model.safetensors"), (0, "optimizer.pt"), (6, "digests.json"), (0, "config.json")]
)
def test_a_damaged_checkpoint_is_trained_again(ok, command, base, tmp_path, step, name):
    run = tmp_path / "run"
    ok("train", run, *base, *STEPS)
    held, weights = arrays(run, "training"), checkpoints(run)
    damaged = run / f"checkpoint-{step}" / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 64
    damaged.write_bytes(content)
    result = command("verify", run)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert f"is damaged ({damaged}): give --repair and run gradfn train {run}" in result.err
    first, last = (0, 2) if step == 0 else (step - 2, step)
    gone = run / f"segments/training-{first:010d}-{last:010d}.h5"
    ok(*mended(ok, command, run, "training", damaged, [gone, damaged.parent]))
    assert (arrays(run, "training"), checkpoints(run)) == (held, weights)
    assert "all as written" in " ".join(ok("verify", run).split())


def test_a_training_does_not_go_on_from_a_damaged_checkpoint(ok, command, base, tmp_path):
    run = tmp_path / "run"
    ok("train", run, *base, *STEPS)
    (run / "training.h5").unlink()
    (run / "segments/training-0000000004-0000000006.h5").unlink()
    damaged = run / "checkpoint-4/model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    result = command("train", run, *base, *STEPS)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert f"{damaged} is damaged (its data is not what was written)" in result.err


def test_shards_are_repaired_and_merged_again(ok, command, base, tmp_path):
    run = tmp_path / "run"
    for number in (1, 2):
        ok("build", run, *base, "--shard", f"{number}/2")
    ok("merge", run)
    held = arrays(run, "store")
    (shard,) = (run / "shards/1-of-2/segments").iterdir()
    flip(shard)
    said = ok("verify", run, "--repair")
    assert f"removed {shard}" in said
    assert f"removed {run / 'segments' / shard.name}" in said
    ok("rerun", run / "shards/1-of-2")
    ok("merge", run)
    assert arrays(run, "store") == held
    assert "all as written" in " ".join(ok("verify", run).split())


def test_what_cannot_be_repaired_is_refused_and_left(ok, command, base, tmp_path):
    def refused(run, words):
        before = state(run) if run.is_dir() else None
        result = command("verify", run, "--repair")
        assert (result.status, result.err.count("\n")) == (2, 1), result.err
        assert words in result.err
        assert before is None or state(run) == before

    with open_writer(tmp_path / "python", "store", {}, 1) as writer:
        writer.write(0, 1, {"x": np.zeros(1)})
        writer.finish()
    flip(tmp_path / "python/segments/store-0000000000-0000000001.h5")
    refused(tmp_path / "python", "no other file of the run says what made it, so nothing was removed")
    ok("train", tmp_path / "run", *base, *STEPS, "--record", tmp_path / "rows")
    (first, *_) = sorted((tmp_path / "rows/segments").iterdir())
    flip(first)
    refused(tmp_path / "rows", "holds rows that were recorded during a training, so nothing was removed")
    refused(first, "is one file: give the directory of the run to repair it")
    ok("build", tmp_path / "linked", *base)
    (segment,) = (tmp_path / "linked/segments").iterdir()
    segment.rename(tmp_path / "elsewhere.h5")
    segment.symlink_to(tmp_path / "elsewhere.h5")
    refused(tmp_path / "linked", "cannot be repaired, and nothing was removed")
    assert (tmp_path / "elsewhere.h5").exists()


def test_a_run_that_is_being_written_is_not_repaired(ok, command, base, tmp_path):
    ok("build", tmp_path / "run", *base)
    (segment,) = (tmp_path / "run/segments").iterdir()
    settings, rows = open_store(tmp_path / "run").settings, open_store(tmp_path / "run").rows
    with open_writer(tmp_path / "run", "store", settings, rows):
        flip(segment)
        result = command("verify", tmp_path / "run", "--repair")
    assert result.status == 2
    assert "another run is writing the store of" in result.err
    assert segment.exists()


def test_a_healthy_run_is_not_touched(ok, base, tmp_path):
    ok("build", tmp_path / "run", *base)
    before = state(tmp_path / "run")
    assert "all as written" in " ".join(ok("verify", tmp_path / "run", "--repair").split())
    assert state(tmp_path / "run") == before
