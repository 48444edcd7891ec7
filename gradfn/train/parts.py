"""The parts that rows have in a gradient: what they go through, and whether they add up to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor, nn

from gradfn.engine.tap import Tapped
from gradfn.errors import InputError
from gradfn.hf.optimizer_state import second_moments
from gradfn.model.sites import View, blocks_of
from gradfn.runs.provenance import Provenance
from gradfn.transforms import Transform, chain
from gradfn.transforms.chain import Blockwise, Chain, Kronecker
from gradfn.transforms.projection import lenient
from gradfn.types import Blocks

__all__ = ["SMALL", "OptimizerScale", "RecordOptions", "SelfCheck", "Stages", "stages_of"]

Normalize = Literal["none", "before", "after"]
TOLERANCE = {False: 1e-3, True: 5e-2}
"""How far the rows' parts may be from the gradient that they add up to: in float32, and in 16 bits."""
SMALL = (torch.bfloat16, torch.float16)


class RecordOptions(TypedDict, total=False):
    """What may be said of a recording.

    Keys:
        transform: what the gradient of a row goes through, such as `project(16)`; None: nothing.
        view: which weights; None: all weight matrices, and of a model with adapters the adapters.
        normalize: "before" divides by `sqrt(v) + eps` of the optimizer before the step, which has none at
            the first step (see `visits/scaled`); "after" by that after it, for which the full gradients of a
            step's rows are held until its end.
        optimizer: whose `v` that is; or a function that gives `sqrt(v) + eps` by block, of no block before
            the first step.
        dtype: of the gradients on disk, float32 or float16.
        start: the first step, where training resumes: rows of this step and later ones are removed.
        again: whether this holds of step 0 too; else a run that has rows is refused there.
        overwrite: replace what is in the run.
        settings: recorded beside what is known of the model and the data, such as a seed.
    """

    transform: Transform | None
    view: View | None
    normalize: Normalize
    optimizer: torch.optim.Optimizer | Callable[[], Blocks] | None
    dtype: torch.dtype
    start: int
    again: bool
    overwrite: bool
    settings: Mapping[str, Any] | Provenance | None


@dataclass(frozen=True, eq=False)
class OptimizerScale(Blockwise):
    """`G -> G / (sqrt(v) + eps)` with the second moment that a running optimizer has at each step.

    Args:
        when: "before" the step whose rows are recorded, or "after" it.
        source: gives `sqrt(v) + eps` by block, of no block before the first step.
    """

    when: Normalize
    source: Callable[[], Blocks] = field(repr=False)
    divisors: Blocks = field(default_factory=dict, repr=False)

    linear = True

    def settings(self) -> dict[str, object]:
        """When; the optimizer changes step by step."""
        return {"transform": "OptimizerScale", "when": self.when}

    def read(self) -> bool:
        """Read the optimizer's state; whether there is one yet."""
        self.divisors.clear()
        self.divisors.update(self.source())
        return bool(self.divisors)

    def block(self, name: str, G: Tensor) -> Tensor:
        """Divide one block, if there is a state yet."""
        return G / self.divisors[name].to(G) if name in self.divisors else G


@dataclass(frozen=True)
class Stages:
    """What runs in the backward pass, what waits until `kappa` is undone, and the optimizer's scaling.

    Args:
        late: whether the scaling, and so everything, waits for the end of the step.
    """

    inside: Chain
    after: Chain
    scale: OptimizerScale | None = None
    late: bool = False


def stages_of(model: nn.Module, options: RecordOptions) -> Stages:
    """Divide a transform into what is linear in a row, and the rest.

    Raises:
        InputError: options that do not go together.
    """
    normalize, optimizer = options.get("normalize", "none"), options.get("optimizer")
    if normalize not in get_args(Normalize):
        raise InputError(f"no normalize {normalize!r}: choose {', '.join(get_args(Normalize))}")
    if (normalize != "none") != (optimizer is not None):
        raise InputError('give `optimizer` with normalize="before" or "after", and with no other')
    if options.get("dtype", torch.float32) not in (torch.float32, torch.float16):
        raise InputError(f"a store has float32 or float16, not {options.get('dtype')}: choose one of them")
    stages, scale = chain(options.get("transform") or chain()).stages, None
    if isinstance(optimizer, torch.optim.Optimizer):
        scale = OptimizerScale(normalize, partial(second_moments, optimizer, model, options.get("view")))
    elif optimizer is not None:
        scale = OptimizerScale(normalize, optimizer)
    if normalize == "after":
        return Stages(chain(), chain(*stages), scale, late=True)
    linear = [isinstance(s, Kronecker) or (isinstance(s, Blockwise) and s.linear) for s in stages]
    count = linear.index(False) if False in linear else len(stages)
    return Stages(chain(*([scale] if scale else []), *stages[:count]), chain(*stages[count:]), scale)


@dataclass(eq=False)
class SelfCheck:
    """Compares the rows' parts of one small weight with its gradient: that of the same backward passes."""

    tapped: Tapped
    transform: Chain
    block: str
    grads: dict[str, list[Tensor]]
    handles: list[Any] = field(default_factory=list)
    low: bool = False

    @classmethod
    def begin(cls, tapped: Tapped, transform: Chain) -> "SelfCheck | None":
        """Listen to the gradient of the smallest weight that is trained, if there is one."""
        parameters = dict(tapped.model.named_parameters())
        trained = [s for s in tapped.sites if s.names and all(parameters[n].requires_grad for n in s.names)]
        if not trained:
            return None
        site = min(trained, key=lambda one: one.weight.numel())
        names = {name for other in tapped.sites if other.block == site.block for name in other.names}
        grads: dict[str, list[Tensor]] = {name: [] for name in names}
        check = cls(tapped, transform, site.block, grads)
        check.handles = [parameters[name].register_hook(_appending(grads[name])) for name in names]
        check.handles.append(site.module.register_forward_hook(check._notice))
        return check

    def _notice(self, module: nn.Module, args: Any, output: Any) -> None:
        self.low |= getattr(output, "dtype", None) in SMALL  # autocast may be inside the model alone

    def passed(self, blocks: Blocks) -> bool:
        """Whether they agree; False where the gradient says nothing, being zero or not finite.

        Raises:
            InputError: they differ.
        """
        for handle in self.handles:
            handle.remove()
        if not all(self.grads.values()):
            return False
        dtype = blocks[self.block].dtype
        summed = {name: torch.stack(grads).sum(0, dtype=dtype)[None] for name, grads in self.grads.items()}
        sites = [site for site in self.tapped.sites if site.block == self.block]
        whole: Any = lenient(self.transform)(blocks_of(sites, summed))
        expected, found = whole[self.block][0], blocks[self.block].sum(0)
        size = float(expected.norm())
        if not 0 < size < float("inf") or not bool(found.isfinite().all()):
            return False
        error = float((found - expected).norm()) / size
        if error > TOLERANCE[self.low]:
            raise InputError(
                f"the rows' parts of {self.block} differ by {error:.1%} from the gradient that they should "
                "add up to: leave what is no loss of rows out of the loss, such as a penalty on the weights, "
                "or exclude the weight from the view"
            )
        return True


def _appending(grads: list[Tensor]) -> Callable[[Tensor], None]:
    return lambda grad: grads.append(grad.detach().clone())
