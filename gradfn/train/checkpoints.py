"""Checkpoints of a training: a model's folder, with the optimizer's state beside the weights."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import PickleError
from typing import Any

import torch
from torch import Tensor, nn

import gradfn
from gradfn.errors import InputError
from gradfn.hf.hub import quiet, summary
from gradfn.model.params import params_of
from gradfn.train import State, Training, first_state
from gradfn.train.optimizers import orthogonalised
from gradfn.types import Params

OPTIMIZER, MARK = "optimizer.pt", "gradfn.json"
MOMENTUM = ("momentum_buffer",)
ADAM = ("exp_avg", "exp_avg_sq")


def take_params(model: nn.Module) -> Params:
    """The parameters of a model, which are empty in it afterwards, so that there is one copy in memory.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> take_params(layer)["weight"].shape, layer.weight.shape
    (torch.Size([1, 2]), torch.Size([0]))
    """
    params = params_of(model)
    for parameter in model.parameters():
        parameter.data = parameter.new_empty(0)
    return params


@dataclass(frozen=True, eq=False)
class Checkpoints:
    """Writes and reads states of the training of one model, as folders that `load_model` reads.

    Args:
        model: of transformers; its parameters are not used.
        training: its optimizer.
        reads: what reads its rows, the tokenizer or the image processor; None: nothing.
        load: loads the model of a folder.
    """

    model: nn.Module
    training: Training
    reads: Any
    load: Callable[[str], nn.Module]

    def write(self, folder: Path, state: State) -> None:
        """Write weights, config, tokenizer and optimizer into a folder that is there."""
        model: Any = self.model
        for name, parameter in self.model.named_parameters():
            parameter.data = state.params[name]
        with quiet():
            model.save_pretrained(folder)
            if self.reads is not None:
                self.reads.save_pretrained(folder)
        take_params(self.model)
        with (folder / OPTIMIZER).open("wb") as file:  # whose errors C++ would not tell
            torch.save(as_torch_optimizer(self.training, state), file)
        mark = {"gradfn": gradfn.__version__, "step": int(state.taken), "of": int(state.total)}
        (folder / MARK).write_text(json.dumps(mark) + "\n", encoding="utf-8")
        for weights in folder.glob("*.safetensors"):  # else they are written for their owner alone
            weights.chmod((folder / MARK).stat().st_mode)

    def read(self, folder: Path) -> State:
        """The state that was written to a folder, to the bit.

        Raises:
            InputError: it cannot be read, or is another's.
        """
        take_params(self.model)
        # Tensors of their own, since products may round otherwise where weights lie unaligned in a file.
        params = {name: value.clone() for name, value in params_of(self.load(str(folder))).items()}
        device = next(iter(params.values())).device
        try:
            mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
            saved = torch.load(folder / OPTIMIZER, map_location=device, weights_only=True)
            state = first_state(params, self.training, torch.tensor(int(mark["of"]), device=device))
            if mark["step"] == 0:
                return state
            names = [name for group in saved["param_groups"] for name in group["param_names"]]
            held = {name: saved["state"].get(number, {}) for number, name in enumerate(names)}
            for name, value in params.items():
                for key, moment in zip(_keys(self.training, name, value.ndim), state.moments, strict=False):
                    moment[name] = _like(value, held[name][key])
            return state._replace(taken=torch.tensor(int(mark["step"]), device=device))
        except (OSError, RuntimeError, LookupError, ValueError, TypeError, EOFError, PickleError) as error:
            raise InputError(
                f"{folder} is no checkpoint that this training wrote ({summary(error)}): delete the run and "
                "begin again"
            ) from error


def as_torch_optimizer(training: Training, state: State) -> dict[str, Any]:
    """The `state_dict` of the optimizer of `torch.optim` that would have taken the same steps, with names.

    That of muon has the groups of two, the parameters of AdamW before those of Muon. Before the first step
    there is no state, as in torch.

    >>> training = Training(1, 1, 0.1, "adam")
    >>> state = first_state({"w": torch.ones(2)}, training, torch.tensor(1))
    >>> made = as_torch_optimizer(training, state._replace(taken=torch.tensor(1)))
    >>> made["param_groups"][0]["param_names"], sorted(made["state"][0])
    (['w'], ['exp_avg', 'exp_avg_sq', 'step'])
    """
    shapes = {name: p.ndim for name, p in state.params.items()}
    muon = [
        name for name, dims in shapes.items() if training.optimizer == "muon" and orthogonalised(name, dims)
    ]
    groups: list[Any] = []
    for names in ([name for name in shapes if name not in muon], muon):
        if names:
            groups += _optimizer(training, names, muon=names is muon).state_dict()["param_groups"]
    held: dict[int, Any] = {}
    for group in groups:  # numbered through, as torch numbers the groups of one optimizer
        group["params"] = list(range(len(held), len(held) + len(group["params"])))
        for name in group["param_names"]:
            keys = _keys(training, name, shapes[name])
            held[len(held)] = {
                **({"step": state.taken.float().cpu()} if keys == ADAM else {}),
                **{key: moment[name].cpu() for key, moment in zip(keys, state.moments, strict=False)},
            }
    return {"state": {n: h for n, h in held.items() if h and state.taken}, "param_groups": groups}


def _optimizer(training: Training, names: list[str], *, muon: bool) -> torch.optim.Optimizer:
    """The optimizer of torch for parameters of these names."""
    rate, decay = training.learning_rate, training.weight_decay
    if muon:
        return torch.optim.Muon(
            [(name, torch.empty(0, 0)) for name in names], rate, decay, training.momentum, training.nesterov,
            adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
    named = [(name, torch.empty(0)) for name in names]
    if training.optimizer == "sgd":
        return torch.optim.SGD(named, rate, training.momentum, nesterov=training.nesterov, weight_decay=decay)
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind(named, rate, training.betas, training.eps, decay)


def _keys(training: Training, name: str, dims: int) -> tuple[str, ...]:
    """What `torch.optim` calls the moments of a parameter."""
    if training.optimizer == "sgd":
        return MOMENTUM if training.momentum else ()
    return MOMENTUM if training.optimizer == "muon" and orthogonalised(name, dims) else ADAM


def _like(value: Tensor, saved: Tensor) -> Tensor:
    """A moment, which must have the shape and the type of its parameter."""
    if saved.shape != value.shape or saved.dtype != value.dtype:
        raise ValueError("a moment is not of its parameter")
    return saved
