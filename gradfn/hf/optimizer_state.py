"""An optimizer's state as a second moment: what Adam or Adafactor divided by, by parameter name.

| state of a parameter | its second moment `v` | divided by |
|---|---|---|
| `exp_avg_sq`, `step` (Adam, AdamW, NAdam, RAdam) | `exp_avg_sq / (1 - beta2^step)` | `sqrt(v) + eps` |
| `square_avg` (RMSprop) | `square_avg`, less `grad_avg²` where centered | `sqrt(v) + eps` |
| `exp_avg_sq_row`, `exp_avg_sq_col` (transformers' Adafactor) | `r cᵀ / mean(r)` | `sqrt(v)` |
| `row_var`, `col_var` (torch's Adafactor) | `max(r cᵀ / max(mean(r), e), e²)` | `sqrt(v)` |
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradfn.errors import InputError
from gradfn.hf.hub import local
from gradfn.hf.optimizer_files import SECOND_MOMENT, Entry, SavedState, read_state
from gradfn.model.sites import Site, View, blocks_of, find_sites
from gradfn.transforms import Transform, adafactor, adam
from gradfn.types import Blocks

__all__ = ["load_optimizer_state", "second_moments"]

_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "square_avg", "row_var",
            "col_var", "variance")  # fmt: skip
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_NORM_PATTERNS = "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"


@dataclass(frozen=True, eq=False)
class _Moment:
    """The second moment of a parameter: whole, or `max(row colᵀ, floor)` over its last two axes."""

    eps: float
    whole: Tensor | None = None
    row: Tensor | None = None
    col: Tensor | None = None
    floor: float = 0.0

    @property
    def positive(self) -> bool:
        """Whether all numbers are above zero, and the floor raises none of them."""
        if self.row is None or self.col is None:
            return self.whole is not None and bool(self.whole.all())
        least = self.row.min() * self.col.min()
        return bool(self.row.all()) and bool(self.col.all()) and bool(least >= self.floor)

    def dense(self) -> Tensor:
        """The second moment in the shape of the parameter."""
        if self.whole is not None:
            return self.whole
        assert self.row is not None
        assert self.col is not None
        least = max(self.floor, torch.finfo(torch.float32).tiny)  # transformers' 1e-30 squared may underflow
        return (self.row[..., :, None] * self.col[..., None, :]).clamp_min(least)


def load_optimizer_state(path: str | Path, model: nn.Module, view: View | None = None) -> Transform:
    """The scaling of gradients in an optimizer's saved state, as the transform `adam` or `adafactor`.

    Parameters are found by name. A file without names is read in the one usual order whose shapes all agree:
    `model.named_parameters()`, or the two groups (decayed, not decayed) of transformers' Trainer. No code in
    the file is run.

    Args:
        path: a torch `state_dict` (.pt, .pth, .bin) of Adam, AdamW, NAdam, RAdam, RMSprop or Adafactor; a
            Trainer's checkpoint folder, or the optimizer.pt in it; or a .safetensors file of second moments,
            `<parameter>.exp_avg_sq`, `exp_avg_sq.<parameter>` or `<parameter>`, which must have been
            corrected for their bias; they get Adam's usual epsilon of 1e-8.
        model: the model that was trained.
        view: which weights get a block.

    Returns:
        `adam(second_moment, eps)`. Of an Adafactor, `adafactor` of row and column means, if the estimates of
        all blocks have rank 1; otherwise `adam` of the estimates with eps 0. The rank is higher for blocks
        with a bias column or more than two axes (fused experts, convolutions), or where torch's floor is
        reached.

    Raises:
        InputError: the file holds no second moments, is of another model, or fits several orders.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"weight.exp_avg_sq": torch.full((1, 2), 4.0)}, f"{folder}/state.safetensors")
    ...     scale = load_optimizer_state(f"{folder}/state.safetensors", nn.Linear(2, 1, bias=False))
    >>> scale({"root": torch.ones(1, 1, 2)})["root"]
    tensor([[[0.5000, 0.5000]]])

    Source: Adam, arXiv:1412.6980, algorithm 1; Adafactor, arXiv:1804.04235, section 3.
    """
    sites = find_sites(model, view)
    moments = _moments(read_state(local(path)), model, sites)
    sides = {site.block: _sides(site, moments[site.names[0]]) for site in sites}
    found = {block: pair for block, pair in sides.items() if pair is not None}
    if len(found) == len(sides):
        return adafactor(found, eps=0.0)
    eps = next(iter(moments.values())).eps
    return adam(_dense_blocks(sites, moments, eps), eps)


def second_moments(optimizer: torch.optim.Optimizer, model: nn.Module, view: View | None = None) -> Blocks:
    """What a running optimizer divides the next step by, `sqrt(v) + eps` of every block, bias-corrected.

    Args:
        optimizer: torch's, or one that has its `state` and `param_groups`.
        model: the model that it trains.
        view: which weights get a block.

    Returns:
        `{block: [out, in]}`, with a bias column; empty before the first step.

    Raises:
        InputError: it keeps no second moments, or none of a parameter of these weights.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.AdamW(net.parameters(), eps=0.5)
    >>> second_moments(optimizer, net)
    {}
    >>> net(torch.tensor([3.0, 1.0])).backward()
    >>> optimizer.step()
    >>> second_moments(optimizer, net)["root"]
    tensor([[3.5000, 1.5000]])
    """
    sites, known = find_sites(model, view), {id(p): name for name, p in model.named_parameters()}
    groups = tuple(
        tuple(
            Entry(known[id(p)], optimizer.state.get(p, {}), group) for p in group["params"] if id(p) in known
        )
        for group in optimizer.param_groups
    )
    saved = SavedState(Path(type(optimizer).__name__), groups)
    if not any(entry.state for entry in saved.entries):
        return {}
    moments = _moments(saved, model, sites)
    eps = next(iter(moments.values())).eps
    return {name: v.sqrt() + eps for name, v in _dense_blocks(sites, moments, eps).items()}


def _moments(saved: SavedState, model: nn.Module, sites: Sequence[Site]) -> dict[str, _Moment]:
    """The second moments of the parameters of the sites, which must have one eps."""
    entries, shapes = _by_name(saved, model), _shapes(model)
    names = dict.fromkeys(name for site in sites for name in site.names)
    moments = {name: _moment_of(name, entries, shapes[name], saved.path) for name in names}
    eps = sorted({moment.eps for moment in moments.values()})
    if len(eps) > 1:
        raise InputError(
            f"{saved.path} has the attributed parameters trained with eps {' and '.join(map(str, eps))}, "
            "expected one: exclude the layers of all but one from the view"
        )
    return moments


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _by_name(saved: SavedState, model: nn.Module) -> dict[str, Entry]:
    """Entries by the model's names of its parameters, from the names in the file or from its order."""
    if any(entry.name is None for entry in saved.entries):
        return dict(zip(_order(saved, model), saved.entries, strict=True))
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    aliases = {alias: known[id(parameter)] for alias, parameter in every}
    return {_canonical(entry.name or "", aliases): entry for entry in saved.entries}


def _canonical(name: str, aliases: Mapping[str, str]) -> str:
    """The model's own name of a parameter that was trained tied, or inside a wrapper."""
    if name not in aliases:
        name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return aliases.get(name, name)


def _order(saved: SavedState, model: nn.Module) -> tuple[str, ...]:
    """The names of an optimizer's parameters, from the one known order that agrees with all shapes."""
    trained = [(number, entry.state) for number, entry in enumerate(saved.entries) if entry.state]
    for number, state in trained or [(0, {})]:
        _refuse_kind(f"parameter {number}", state, saved.path)
    sizes, shapes = [len(group) for group in saved.groups], _shapes(model)
    orders = list(dict.fromkeys(_orders(model, sizes, saved.by_trainer)))
    if not orders:
        raise InputError(
            f"{saved.path} has the state of {sum(sizes)} parameters and no names, the model {len(shapes)} "
            "parameters: give the model that was trained, or the state of an optimizer made of "
            "model.named_parameters()"
        )
    faults = [_fault(order, saved.entries, shapes) for order in orders]
    fits = [order for order, fault in zip(orders, faults, strict=True) if fault is None]
    if not fits:
        raise InputError(f"{saved.path} is of another model, {faults[0]}: give the model that was trained")
    if len(fits) > 1 and not saved.by_trainer:
        place = next(i for i, names in enumerate(zip(*fits, strict=True)) if len(set(names)) > 1)
        raise InputError(
            f"{saved.path} does not say whether state {place} belongs to {fits[0][place]} or to "
            f"{fits[1][place]}, which have the same shape: save the state of an optimizer made of "
            "model.named_parameters(), or give the Trainer's whole folder"
        )
    return fits[0]


def _fault(order: Sequence[str], entries: Sequence[Entry], shapes: Mapping[str, Any]) -> str | None:
    """The first parameter whose state has another shape, if there is one."""
    for name, entry in zip(order, entries, strict=True):
        found = _shape_of(entry.state)
        if found not in (None, shapes[name]):
            return f"the second moment of {name} has shape {found}, the parameter {shapes[name]}"
    return None


def _shape_of(state: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of the parameter to which a state belongs, or None if it cannot be seen."""
    for row, col in (("exp_avg_sq_row", "exp_avg_sq_col"), ("row_var", "col_var")):
        if row in state and col in state:
            lead = state[row].shape if row != "row_var" else state[row].shape[:-1]
            return (*lead, state[col].shape[-1])
    found = next((state[key] for key in (SECOND_MOMENT, "square_avg", "variance") if key in state), None)
    return None if found is None else tuple(found.shape)


def _orders(model: nn.Module, sizes: Sequence[int], by_trainer: bool) -> Iterator[tuple[str, ...]]:
    """The usual orders of parameters in optimizers, if they fit the sizes of the groups.

    A Trainer decays neither biases nor LayerNorms, and, since transformers 4.46, nothing named a norm.
    """
    plain, split = [], []
    for pool in _pools(model):
        if len(pool) == sum(sizes):
            plain.append(tuple(pool))
        for patterns in (("bias", *_NORM_PATTERNS), ("bias",)):
            decayed = _decayed(model, patterns)
            parts = [n for n in pool if n in decayed], [n for n in pool if n not in decayed]
            if [len(part) for part in parts] == list(sizes):
                split.append((*parts[0], *parts[1]))
    yield from split + plain if by_trainer else plain + split


def _pools(model: nn.Module) -> Iterator[list[str]]:
    """The sets of parameters that may have been trained: all, those not frozen, those of adapters."""
    parameters = dict(model.named_parameters())
    yield list(parameters)
    yield [name for name, parameter in parameters.items() if parameter.requires_grad]
    yield [name for name in parameters if "lora_" in name]


def _decayed(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """The parameters with weight decay in a Trainer: not those of a LayerNorm, nor names that match."""
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    plain = re.compile("|".join(patterns))
    return {n for n, p in model.named_parameters() if id(p) not in norms and not plain.search(n.lower())}


def _moment_of(name: str, entries: Mapping[str, Entry], shape: tuple[int, ...], path: Path) -> _Moment:
    """The second moment of one parameter, corrected for its bias."""
    entry = entries.get(name)
    if entry is None or not entry.state:
        raise InputError(
            f"{path} has no state of {name}, which was frozen or has another name there: exclude its layer "
            "from the view, or give the state of an optimizer that trained it"
        )
    _refuse_kind(name, entry.state, path)
    found = _shape_of(entry.state)
    if found != shape:
        raise InputError(
            f"{path} is of another model, the second moment of {name} has shape {found}, the parameter "
            f"{shape}: give the model that was trained"
        )
    return _parse(name, entry.state, entry.group, path)


def _refuse_kind(name: str, state: Mapping[str, Any], path: Path) -> None:
    """Refuse a state without a second moment, or whose second moment is not plain numbers."""
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    strange = any(v.layout != torch.strided or v.is_quantized for v in tensors)
    if strange or "state2" in state or any("quant_state" in str(key) for key in state):
        raise InputError(
            f"{path} has a sparse or quantised state of {name}: "
            "train with a dense optimizer such as torch.optim.AdamW, whose second moment is exp_avg_sq"
        )
    if any(key in _MOMENTS and not isinstance(value, Tensor) for key, value in state.items()):
        raise InputError(f"{path} has no tensors for {name}: save optimizer.state_dict() as it is")
    if _shape_of(state) is None:
        held = ", ".join(map(str, list(state)[:6])) or "nothing"
        raise InputError(
            f"{path} has no second moment of {name}, only {held}: "
            "expected the state of Adam, AdamW, NAdam, RAdam, RMSprop or Adafactor"
        )


def _parse(name: str, state: Mapping[str, Any], group: Mapping[str, Any], path: Path) -> _Moment:
    """The second moment in the state of each kind of optimizer; see the table at the top."""
    values = {key: _checked(v, name, path) for key, v in state.items() if key in _MOMENTS}
    if "row_var" in state or "variance" in state:
        least = (_sequence(group.get("eps"), "eps", name, path) or (None,))[0]
        return _of_torch_adafactor(
            state, values, None if least is None else _number(least, "eps", name, path)
        )
    if "exp_avg_sq_row" in state:
        row, col = values["exp_avg_sq_row"], values["exp_avg_sq_col"]
        return _Moment(0.0, row=row, col=col / row.mean(-1, keepdim=True))
    if "decay_rate" in group:  # a vector of transformers' Adafactor
        return _Moment(0.0, values[SECOND_MOMENT])
    eps = _number(group.get("eps"), "eps", name, path)
    if "square_avg" in state:
        centre = _tensor(state, "grad_avg", name, path).square() if group.get("centered") else 0.0
        return _Moment(eps, (values["square_avg"] - centre).clamp_min(0))
    v = _tensor(values, "max_exp_avg_sq" if group.get("amsgrad") else SECOND_MOMENT, name, path)
    betas = _sequence(group.get("betas"), "betas", name, path)
    beta2 = _number(betas[-1] if len(betas) > 1 else None, "betas", name, path)
    step = _number(state.get("step", group.get("step")), "step", name, path)
    if beta2 >= 1:
        raise InputError(f"{path} has beta2 {beta2:g} for {name}, expected less than 1: correct the state")
    if step < 1:
        raise InputError(
            f"{path} has {name} before its first step: give the state of an optimizer that has trained"
        )
    return _Moment(eps, v / (1 - beta2**step))


def _of_torch_adafactor(state: Mapping[str, Any], values: Mapping[str, Tensor], eps: float | None) -> _Moment:
    """The second moment in torch's Adafactor. Its floor is the eps of its dtype, unless one was given."""
    kind = state["row_var" if "row_var" in state else "variance"].dtype
    least = torch.finfo(kind).eps if eps is None else eps
    if "variance" in state:
        return _Moment(0.0, values["variance"].clamp_min(least**2))
    row, col = values["row_var"].squeeze(-1), values["col_var"].squeeze(-2)
    return _Moment(0.0, row=row, col=col / row.mean(-1, keepdim=True).clamp_min(least), floor=least**2)


def _tensor(values: Mapping[str, Any], key: str, name: str, path: Path) -> Tensor:
    if not isinstance(values.get(key), Tensor):
        raise InputError(f"{path} has no {key} of {name}: save optimizer.state_dict() as it is")
    return values[key]


def _sequence(value: Any, key: str, name: str, path: Path) -> Sequence[Any]:
    if value is None or isinstance(value, list | tuple):
        return value or ()
    raise InputError(f"{path} has {key} {value!r} for {name}, expected several: correct the state")


def _number(value: Any, key: str, name: str, path: Path) -> float:
    """A number that is not below zero."""
    if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
        if not float(value) >= 0:
            raise InputError(f"{path} has {key} {float(value):g} for {name}, expected 0 or more: correct it")
        return float(value)
    raise InputError(
        f"{path} has no {key} for {name}, expected a number: give the state of torch's Adam, AdamW, NAdam, "
        "RAdam, RMSprop or Adafactor, or second moments as .safetensors"
    )


def _checked(v: Tensor, name: str, path: Path) -> Tensor:
    """A second moment in float32 or better, without negative numbers."""
    if not (v.is_floating_point() and bool((v >= 0).all()) and bool(v.isfinite().all())):
        raise InputError(
            f"{path} has negative or non-finite numbers for {name}, where a second moment was expected: "
            "check that it holds an optimizer's state, not weights, and that training did not diverge"
        )
    return v.to(torch.promote_types(v.dtype, torch.float32))


def _sides(site: Site, moment: _Moment) -> tuple[Tensor, Tensor] | None:
    """Row and column means of a block's second moment, if an Adafactor estimated it with rank 1."""
    row, col, whole = moment.row, moment.col, moment.whole
    if site.layer.bias or not moment.positive:
        return None
    if whole is not None and moment.eps == 0 and site.spec.shape == (whole.numel(), 1):
        return whole.reshape(-1).to(site.weight.device), whole.mean().reshape(1).to(site.weight.device)
    sides = None if row is None or col is None or row.ndim > 1 else site.layer.rank_one(row, col)
    if sides is None:
        return None
    row, col = sides
    return row.to(site.weight.device), (col * row.mean()).to(site.weight.device)


def _dense_blocks(sites: Sequence[Site], moments: Mapping[str, _Moment], eps: float) -> Blocks:
    """The second moments laid out as blocks, like the gradients of the parameters."""
    rows = {name: moment.dense()[None] for name, moment in moments.items()}
    devices = {site.block: site.weight.device for site in sites}
    blocks = {block: G[0].to(devices[block]) for block, G in blocks_of(sites, rows).items()}
    if eps == 0:
        for block, v in blocks.items():
            if not bool(v.all()):
                raise InputError(
                    f"the second moment of {block} has zeros and the optimizer an eps of 0, so gradients "
                    "would be divided by zero: exclude it from the view, or train with an eps"
                )
    return blocks
