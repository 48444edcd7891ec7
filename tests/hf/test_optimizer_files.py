import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from gradfn.errors import InputError
from gradfn.hf.optimizer_files import SECOND_MOMENT, read_state


def test_a_state_dict_is_read_by_group_and_in_its_order(tmp_path):
    weights = {name: torch.nn.Parameter(torch.ones(size)) for name, size in (("a", 2), ("b", 3))}
    groups = [{"params": [(name, p)], "lr": rate} for rate, (name, p) in enumerate(weights.items(), 1)]
    optimizer = torch.optim.Adam(groups)
    sum((p * p).sum() for p in weights.values()).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    saved = read_state(tmp_path)
    assert [entry.name for entry in saved.entries] == ["a", "b"]
    assert [entry.group["lr"] for entry in saved.entries] == [1, 2]
    torch.testing.assert_close(saved.entries[1].state[SECOND_MOMENT], torch.full((3,), 0.004))
    assert not saved.by_trainer
    (tmp_path / "trainer_state.json").write_text("{}")
    assert read_state(tmp_path / "optimizer.pt").by_trainer


def test_safetensors_without_marked_names_are_all_second_moments(tmp_path):
    save_file({"a": torch.ones(1), "b": torch.ones(2)}, tmp_path / "all.safetensors")
    save_file({"a.exp_avg_sq": torch.ones(1), "other": torch.ones(2)}, tmp_path / "some.safetensors")
    assert [entry.name for entry in read_state(tmp_path / "all.safetensors").entries] == ["a", "b"]
    assert [entry.name for entry in read_state(tmp_path / "some.safetensors").entries] == ["a"]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, form):
    content = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))]).state_dict()
    content["param_groups"][0]["lr"] = Evil(tmp_path / "made")
    path = tmp_path / "state.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(content["param_groups"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(InputError, match="could run code, so it was not loaded"):
        read_state(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("state.pt", b"PK\3\4 nothing", "state.pt cannot be read"),
        ("state.pt", b"", "state.pt cannot be read"),
        ("state.pt", b"hello", "state.pt cannot be read"),
        ("state.safetensors", b"nothing", "not a .safetensors file"),
        ("state.json", b"{}", "has no known ending"),
        ("folder/scheduler.pt", b"", "holds no optimizer.pt, only scheduler.pt"),
        (".", None, "holds no optimizer.pt, only nothing"),
        ("missing.pt", None, "no file or folder here has this name"),
    ],
)
def test_what_is_no_file_of_state_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_state(path.parent if "/" in name else path)
