import shutil
import socket
import time

import huggingface_hub.constants
import pytest

from gradfn.errors import InputError
from gradfn.hf import hub, load_model, load_tokenizer
from gradfn.model.fingerprint import model_fingerprint


def test_a_folder_without_a_model(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"holds no model: .* but it holds notes.txt; give the folder"):
        load_model(tmp_path)


def test_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match="it holds nothing"):
        load_model(tmp_path)


def test_a_crowded_folder_is_not_listed_in_full(tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(InputError, match=r"holds 0.txt, 1.txt, .*, 5.txt and 3 more;"):
        load_model(tmp_path)


def test_two_gguf_files(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"holds 2 .gguf files: give the path of one of a.gguf, b.gguf"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", [b"", b"junk"])
def test_a_file_that_is_no_gguf(tmp_path, content):
    (tmp_path / "a.gguf").write_bytes(content)
    for load in (load_model, load_tokenizer):
        with pytest.raises(InputError, match=r"a.gguf does not start like a GGUF file"):
            load(tmp_path)


def test_a_cut_gguf(gguf_file, tmp_path):
    (tmp_path / "a.gguf").write_bytes(gguf_file.read_bytes()[:2000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(tmp_path / "a.gguf")


def test_a_file_of_another_kind(neox_folder):
    with pytest.raises(
        InputError, match=r"model.safetensors is not a model: expected a .gguf file or the folder"
    ):
        load_model(neox_folder / "model.safetensors")


@pytest.mark.parametrize("path", ["no/such/folder", "./nowhere", "/nowhere", "a.gguf", "~/nowhere", ""])
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_path_that_does_not_exist(path, load, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gradfn.hf.locate.hub_answers", lambda: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="no file or folder here has this name; check the path"):
        load(path or "x/y/z")


def test_a_path_object_is_never_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.setattr("gradfn.hf.locate.hub_answers", lambda: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="check the path"):
        load_model(tmp_path.relative_to(tmp_path) / "gpt2")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_hub_name_without_a_hub(no_hub, load, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    with pytest.raises(
        InputError, match=r"not among the cached downloads, and the hub does not answer: give"
    ):
        load("gradfn-tests/no-such-model")
    assert time.perf_counter() - start < 5
    assert capfd.readouterr() == ("", "")


def test_a_hub_that_accepts_but_never_answers(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(
            huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}"
        )
        monkeypatch.setattr(hub, "_PATIENCE", 0.2)
        start = time.perf_counter()
        assert not hub.hub_answers()
        assert time.perf_counter() - start < 2


def test_a_cached_download_needs_no_hub(no_hub, llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--gradfn-tests--tiny"
    shutil.copytree(llama_folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.chdir(tmp_path)
    expected = model_fingerprint(load_model(llama_folder))
    assert model_fingerprint(load_model("gradfn-tests/tiny")) == expected
    assert len(load_tokenizer("gradfn-tests/tiny")) == len(load_tokenizer(llama_folder))
