"""A checkpoint is a model's folder, and the state in it is the same to the bit."""

import json
import os

import pytest
import torch
from tiny import make_model, make_tokenizer
from train_problems import SETTINGS

from gradfn.errors import InputError
from gradfn.hf.models import load_model
from gradfn.hf.optimizer_state import load_optimizer_state
from gradfn.hf.tokenizers import load_tokenizer
from gradfn.model.params import params_of
from gradfn.model.sites import find_sites
from gradfn.train import State, first_state, update
from gradfn.train.checkpoints import Checkpoints, as_torch_optimizer, take_params

TOTAL = torch.tensor(9)


def taken(training, model, steps=2):
    """A state behind some steps along random gradients."""
    state, generator = first_state(params_of(model), training, TOTAL), torch.Generator().manual_seed(0)
    for _ in range(steps):
        grads = {n: torch.randn(p.shape, generator=generator) for n, p in state.params.items()}
        state = update(training, state, grads)
    return state


def copy(state):
    return State({**state.params}, tuple({**part} for part in state.moments), state.taken, state.total)


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw", "muon"])
@pytest.mark.parametrize(("kind", "steps"), [("llama", 2), ("neox", 2), ("neox", 0)])
def test_a_state_is_read_as_it_was_written(tmp_path, name, kind, steps):
    training, model = SETTINGS[name], make_model(kind)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    state = taken(training, model, steps)
    kept = copy(state)
    keeper = Checkpoints(model, training, make_tokenizer(), load_model)
    take_params(model)
    keeper.write(tmp_path, state)
    assert all(p.numel() == 0 for p in model.parameters())
    torch.testing.assert_close(keeper.read(tmp_path), kept, rtol=0, atol=0)
    loaded = load_model(tmp_path)
    torch.testing.assert_close(params_of(loaded), kept.params, rtol=0, atol=0)
    assert load_tokenizer(tmp_path).get_vocab() == make_tokenizer().get_vocab()
    modes = {os.stat(path).st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
    if steps == 0:
        assert torch.load(tmp_path / "optimizer.pt")["state"] == {}  # as in torch
        with pytest.raises(InputError, match="has no state"):
            load_optimizer_state(tmp_path, loaded)


def test_the_optimizer_is_that_of_torch(tmp_path):
    training, model = SETTINGS["adamw"], make_model()
    state = taken(training, model, 3)
    saved = as_torch_optimizer(training, state)
    made = torch.optim.AdamW(model.named_parameters())
    made.load_state_dict(saved)
    (group,) = made.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == (training.betas, training.eps, 0.1)
    for p, (name, m) in zip(group["params"], state.moments[0].items(), strict=True):
        assert torch.equal(made.state[p]["exp_avg"], m), name
        assert made.state[p]["step"] == 3
    torch.save(saved, tmp_path / "optimizer.pt")
    scale = load_optimizer_state(tmp_path, model)
    block = "model.layers.0.mlp.up_proj"
    v = state.moments[1][f"{block}.weight"] / (1 - training.betas[1] ** 3)
    shapes = {site.block: site.spec.shape for site in find_sites(model)}
    G = {path: torch.ones(1, *shape) for path, shape in shapes.items()}
    torch.testing.assert_close(scale(G)[block][0], 1 / (v.sqrt() + training.eps))


def test_the_optimizers_of_muon_are_those_of_torch():
    training, model = SETTINGS["muon"], make_model()
    state = taken(training, model, 3)
    saved = as_torch_optimizer(training, state)
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    assert sorted(saved["state"]) == [*range(sum(sizes))]
    kinds = (torch.optim.AdamW, 0), (torch.optim.Muon, sizes[0])
    for (kind, first), group in zip(kinds, saved["param_groups"], strict=True):
        named = [(name, torch.nn.Parameter(state.params[name])) for name in group["param_names"]]
        made, numbers = kind(named), range(first, first + len(named))
        held = {number - first: saved["state"][number] for number in numbers}
        made.load_state_dict({"state": held, "param_groups": [{**group, "params": [*range(len(named))]}]})
        for p, (name, _) in zip(made.param_groups[0]["params"], named, strict=True):
            key = "momentum_buffer" if kind is torch.optim.Muon else "exp_avg"
            assert torch.equal(made.state[p][key], state.moments[0][name]), name
    matrices = {n for n in saved["param_groups"][1]["param_names"]}
    assert matrices == {n for n, p in state.params.items() if p.ndim == 2 and ".layers." in n}


def test_what_is_no_checkpoint_is_refused(tmp_path):
    training, model = SETTINGS["adamw"], make_model()
    state = taken(training, model)
    keeper = Checkpoints(model, training, None, load_model)
    keeper.write(tmp_path, state)
    saved = torch.load(tmp_path / "optimizer.pt")
    mark = json.loads((tmp_path / "gradfn.json").read_text())
    assert (mark["step"], mark["of"]) == (2, 9)
    saved["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(saved, tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match=r"is no checkpoint that this training wrote .*delete the run"):
        keeper.read(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"cut")
    with pytest.raises(InputError, match="is no checkpoint that this training wrote"):
        keeper.read(tmp_path)
