"""`gradfn verify`: the damaged files of a run, and the command that makes them again."""

import shlex
import shutil
from pathlib import Path

import pytest
from stored import flip

TESTS = Path(__file__).parents[1]
ASK = ("--query", "The capital of Peru is", "--completion", " Lima")


@pytest.fixture
def base(model, corpus):
    return "--model", model, "--dataset", corpus


def plain(text):
    return " ".join(text.split())


def test_a_run_that_is_as_it_was_written(ok, base, tmp_path):
    ok("build", tmp_path / "run", *base)
    assert f"verified 2 files of {tmp_path / 'run'}: all as written" in plain(ok("verify", tmp_path / "run"))
    assert "verified 1 file of" in plain(ok("verify", tmp_path / "run/store.h5"))


@pytest.mark.parametrize(("kind", "more"), [("build", ()), ("score", ASK), ("hessian", ())])
def test_what_is_damaged_is_named_with_its_command(command, ok, base, tmp_path, kind, more):
    run = tmp_path / "run"
    ok(kind, run, *base, *more)
    for path in sorted(run.rglob("*.h5")):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        result = command("verify", run)
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert (
            f"1 of 2 files of {run} is damaged ({path}): delete it and run gradfn {kind} {run}" in result.err
        )
        path.unlink()
        again = result.err.split("delete it and run gradfn ")[1].split(", which recomputes only")[0]
        ok(*shlex.split(again))
        assert "all as written" in plain(ok("verify", run))


def test_a_damaged_segment_is_named_once_and_made_again_where_the_run_is_now(
    command, ok, base, tmp_path, monkeypatch
):
    ok("build", tmp_path / "run", *base)
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    (path,) = (tmp_path / "moved/segments").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    result = command("verify", "moved")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert f"1 of 2 files of moved is damaged (moved/segments/{path.name}): delete it and" in result.err
    assert result.out.count(path.name) == 1
    path.unlink()
    again = result.err.split("delete it and run gradfn ")[1].split(", which recomputes only")[0]
    ok(*shlex.split(again))
    assert "all as written" in plain(ok("verify", "moved"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("asked", [
    "verify PATH", "verify PATH --repair", "info PATH", "rerun PATH", "merge RUN PATH PATH",
    "export PATH a.npy", "report PATH --output a.html", "select PATH --keep 0.5 --output a.csv",
    "query PATH --query text",
])  # fmt: skip
def test_nobody_is_told_to_delete_a_file_that_is_not_of_gradfn(command, tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')
    result = command(*asked.replace("PATH", str(path)).split())
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert str(path) in result.err
    assert "give the directory of a run" in result.err
    assert "delete it" not in result.err + result.out


def test_shards_are_verified_and_merged_again(command, ok, base, tmp_path):
    run = tmp_path / "run"
    for number in (1, 2):
        ok("build", run, *base, "--shard", f"{number}/2")
    ok("merge", run)
    (shard,) = (run / "shards/1-of-2/segments").iterdir()
    joined = run / "segments" / shard.name
    flip(shard)
    result = command("verify", run)
    assert result.status == 2
    for path in (shard, joined):
        assert str(path) in result.err
        path.unlink()
    assert f"gradfn merge {run}" in result.err
    assert "--shard 1/2" in result.err
    ok("build", run, *base, "--shard", "1/2")
    ok("merge", run)
    assert "7 files" in ok("verify", run)


@pytest.mark.parametrize("old", ["store/data/v2", "runs/data/v1/scores"])
def test_of_a_run_from_before_digests_the_structure_alone_is_checked(ok, tmp_path, old):
    said = plain(ok("verify", shutil.copytree(TESTS / old, tmp_path / "run")))
    assert "no damage found" in said
    assert "as written" not in said
    assert "written before digests were kept: only structure was checked" in said
    assert "make again with the command that made it" in said


def test_of_an_older_run_the_command_is_named_that_makes_it_again(ok, base, tmp_path, monkeypatch):
    ok("build", tmp_path, *base)
    monkeypatch.setattr("gradfn.cli.verify.DIGESTED", 5)
    assert f"make again with gradfn build {tmp_path}" in plain(ok("verify", tmp_path))


def test_what_is_no_run(command, tmp_path):
    assert "holds no run" in command("verify", tmp_path).err
    assert "holds no run" in command("verify", tmp_path / "absent").err
    (tmp_path / "note.txt").write_text("no run")
    assert "note.txt is no file of gradfn: give the" in command("verify", tmp_path / "note.txt").err
