"""Hypothesis strategies: losses, ragged data, views and chains of transforms, all in float64."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from gradfn.data import IGNORED
from gradfn.errors import InputError
from gradfn.linalg.maps import Kind
from gradfn.linalg.spectrum import Damping, Spectrum
from gradfn.model.losses import CausalLMLoss, model_loss
from gradfn.model.params import call
from gradfn.model.sites import View
from gradfn.statistics.curvature import dense_spectrum, product_spectrum
from gradfn.testing.models import (
    VOCAB,
    Draw,
    convnets,
    encoders,
    language_models,
    mlps,
    randomize,
    seeds,
)
from gradfn.testing.naive import naive_causal_lm_loss, naive_token_loss
from gradfn.transforms import (
    Chain,
    Compress,
    Project,
    Transform,
    adafactor,
    adam,
    chain,
    precondition,
    unit_normalize,
)
from gradfn.transforms.joint import JOINT, joint
from gradfn.types import Batch, Blocks, Example, LossFn, Params

__all__ = [
    "KINDS", "VOCAB", "Problem", "SquaredError", "blocks", "chains", "dampings", "encoder_rows",
    "image_rows", "problems", "randomize", "seeds", "shapes_of", "spectra", "squared_error", "token_rows",
    "vector_rows", "views",
]  # fmt: skip

KINDS: tuple[Kind, ...] = ("rademacher", "gaussian", "orthonormal", "mask", "sjlt", "fjlt")
"""Of random projections."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A model, a loss and data to attribute.

    Args:
        model: a module in float64.
        loss: the loss that an engine gets.
        reference: the same loss written plainly, for one unpadded example.
        rows: examples, ragged where they are token rows.
    """

    model: nn.Module
    loss: LossFn
    reference: Callable[[Params, Example], Tensor] = field(metadata={"shown": False})
    rows: list[dict[str, Tensor]]


@st.composite
def token_rows(
    draw: Draw, vocab: int = VOCAB, *, min_rows: int = 1, max_rows: int = 5, max_length: int = 7
) -> list[dict[str, Tensor]]:
    """Ragged token rows with labels: all supervised, a completion only, scattered positions, or none.

    Args:
        vocab: token ids are below it.
        min_rows, max_rows: how many rows.
        max_length: tokens of a row, at most; at least 1.
    """
    rows = []
    for _ in range(draw(st.integers(min_rows, max_rows))):
        ids = torch.tensor(draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=max_length)))
        match draw(st.sampled_from(["all", "completion", "scattered", "none"])):
            case "all":
                ignored = torch.zeros(len(ids), dtype=torch.bool)
            case "completion":
                ignored = torch.arange(len(ids)) < draw(st.integers(0, len(ids)))
            case "scattered":
                ignored = torch.tensor(draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
            case _:
                ignored = torch.ones(len(ids), dtype=torch.bool)
        rows.append({"input_ids": ids, "labels": ids.masked_fill(ignored, IGNORED)})
    return rows


@st.composite
def vector_rows(
    draw: Draw, features: int = 3, outputs: int = 2, *, min_rows: int = 1, max_rows: int = 6
) -> list[dict[str, Tensor]]:
    """Regression rows `{"x": [features] or [positions, features], "y": [outputs]}`; some inputs are zero."""
    generator = torch.Generator().manual_seed(draw(seeds()))
    positions = draw(st.sampled_from([(), (1,), (3,)]))
    rows = []
    for zero in draw(st.lists(st.booleans(), min_size=min_rows, max_size=max_rows)):
        x, y = (_halves(shape, generator) for shape in ((*positions, features), (outputs,)))
        rows.append({"x": x * (not zero), "y": y})
    return rows


def _halves(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal numbers rounded to halves, which are easily read in a counterexample."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).round() / 2


@st.composite
def image_rows(draw: Draw, *, min_rows: int = 1, max_rows: int = 4) -> list[dict[str, Tensor]]:
    """Images `{"x": [2, 4, 4], "y": [2]}`."""
    generator = torch.Generator().manual_seed(draw(seeds()))
    count = draw(st.integers(min_rows, max_rows))
    return [{"x": _halves((2, 4, 4), generator), "y": _halves((2,), generator)} for _ in range(count)]


@st.composite
def encoder_rows(
    draw: Draw, task: str, *, min_rows: int = 1, max_rows: int = 4, max_length: int = 6
) -> list[dict[str, Tensor]]:
    """Ragged rows of an encoder, `{"input_ids", "attention_mask", "labels"}`.

    Args:
        task: "classification" (a label a row, of 3) or "masked_lm" (a label a token, -100 where not asked).
        min_rows, max_rows, max_length: how many rows, of how many tokens.
    """
    rows = []
    for _ in range(draw(st.integers(min_rows, max_rows))):
        ids = torch.tensor(draw(st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=max_length)))
        labels = torch.tensor(draw(st.integers(0, 2)))
        if task == "masked_lm":
            asked = torch.tensor(draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
            labels = torch.where(asked, ids, IGNORED)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def squared_error(model: nn.Module) -> LossFn:
    """A user's loss, `sum (f(x) - y)²`, summed over positions too.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> squared_error(net)({"weight": torch.ones(1, 1)}, {"x": torch.ones(1), "y": torch.zeros(1)})
    tensor(1.)
    """

    def loss(params: Params, example: Example) -> Tensor:
        return (call(model, params, example["x"]) - example["y"]).square().sum()

    return loss


@dataclass(frozen=True, eq=False)
class SquaredError:
    """`sum (f(x) - y)²` of a model that wants a batch axis, with a batched form.

    >>> SquaredError(nn.Linear(1, 1)).batched({"x": torch.zeros(5, 1), "y": torch.zeros(5, 1)}).shape
    torch.Size([5])
    """

    model: nn.Module

    def __call__(self, params: Params, example: Example) -> Tensor:
        return (call(self.model, params, example["x"][None])[0] - example["y"]).square().sum()

    def batched(self, batch: Batch) -> Tensor:
        """The same in one forward."""
        return (self.model(batch["x"]) - batch["y"]).square().sum(1)


def _mlp(draw: Draw, min_rows: int) -> Problem:
    model = draw(mlps())
    loss = squared_error(model)
    return Problem(model, loss, loss, draw(vector_rows(min_rows=min_rows)))


def _conv(draw: Draw, min_rows: int) -> Problem:
    model = draw(convnets())
    loss = SquaredError(model)
    return Problem(model, loss, loss, draw(image_rows(min_rows=min_rows)))


def _lm(draw: Draw, min_rows: int) -> Problem:
    model, reduction = draw(language_models()), draw(st.sampled_from(["mean", "sum"]))
    loss = CausalLMLoss(model, reduction, fused_head=draw(st.booleans()))
    return Problem(model, loss, naive_causal_lm_loss(model, reduction), draw(token_rows(min_rows=min_rows)))


def _weighted_lm(draw: Draw, min_rows: int) -> Problem:
    """Any criterion, label smoothing, and a weight for each row, negative ones too."""
    model, reduction = draw(language_models()), draw(st.sampled_from(["mean", "sum"]))
    criterion = draw(st.sampled_from(["cross_entropy", "log_odds"]))
    smoothing = draw(st.sampled_from([0.0, 0.25])) if criterion == "cross_entropy" else 0.0
    loss = CausalLMLoss(model, reduction, criterion=criterion, label_smoothing=smoothing)
    reference = naive_causal_lm_loss(model, reduction, criterion, smoothing)
    rows = draw(token_rows(min_rows=min_rows))
    weights = st.sampled_from([-0.5, 1.0, 0.0])
    return Problem(
        model, loss, reference, [{**row, "weight": torch.tensor(draw(weights)).double()} for row in rows]
    )


def _encoder(draw: Draw, min_rows: int) -> Problem:
    model = draw(encoders())
    task = "masked_lm" if type(model).__name__.endswith("MaskedLM") else "classification"
    rows = draw(encoder_rows(task, min_rows=min_rows))

    def reference(params: Params, example: Example) -> Tensor:
        logits = functional_call(model, params, (), {"input_ids": example["input_ids"][None]}).logits[0]
        if task == "classification":
            return F.cross_entropy(logits, example["labels"])
        total = naive_token_loss(logits, example["labels"])
        return total / max(1, int((example["labels"] != IGNORED).sum()))

    return Problem(model, model_loss(model, task), reference, rows)


_PROBLEMS = {"mlp": _mlp, "conv": _conv, "lm": _lm, "weighted_lm": _weighted_lm, "encoder": _encoder}


def check_kinds(kinds: Sequence[str]) -> None:
    """Refuse models that `problems` does not have."""
    unknown = [kinds] if isinstance(kinds, str) else sorted(set(kinds) - _PROBLEMS.keys())
    if unknown:
        known = ", ".join(_PROBLEMS)
        raise InputError(f"kinds are several of {known}, not {unknown[0]!r}: give kinds=('mlp', 'lm')")


@st.composite
def problems(draw: Draw, kinds: Sequence[str] = ("mlp", "lm"), *, min_rows: int = 1) -> Problem:
    """A model with its loss and data.

    Args:
        kinds: any of "mlp" (some with a layer that occurs twice), "conv" (images), "lm" (causal language
            models, with and without the fused head), "weighted_lm" (other criteria, and weighted rows), and
            "encoder" (with padding to mask). Counterexamples are of the first kind that has one.
        min_rows: rows of data, at least.
    """
    return _PROBLEMS[draw(st.sampled_from(kinds))](draw, min_rows)


@st.composite
def views(draw: Draw, model: nn.Module) -> View:
    """Views of a model by example: the default or everything, and attention heads where it has them."""
    heads = draw(st.booleans()) if hasattr(model, "config") else False
    include = draw(st.sampled_from([(), ("*",)]))
    return View(include=include, heads=heads)


@st.composite
def blocks(draw: Draw, *, min_rows: int = 1, max_rows: int = 4) -> Blocks:
    """Dense gradients `{"a": [rows, out, in], ...}` of one to three layers; some rows are zero."""
    generator = torch.Generator().manual_seed(draw(seeds()))
    zeros = draw(st.lists(st.booleans(), min_size=min_rows, max_size=max_rows))
    keep = 1.0 - torch.tensor(zeros).double()[:, None, None]
    sizes = st.tuples(st.integers(1, 4), st.integers(1, 4))
    shapes = draw(st.lists(sizes, min_size=1, max_size=3))
    return {
        name: keep * _halves((len(zeros), *shape), generator)
        for name, shape in zip("abc", shapes, strict=False)
    }


def dampings(*, factored: bool = False) -> st.SearchStrategy[Damping]:
    """Dampings of every kind; "factored" only on demand, since not every curvature allows it."""
    kinds = ["relative", "absolute", "truncated", "tikhonov", *(["factored"] if factored else [])]
    return st.builds(Damping, st.sampled_from([0.03, 0.3, 1.7]), st.sampled_from(kinds))


@st.composite
def spectra(
    draw: Draw, shapes: Mapping[str, tuple[int, int]], *, products: bool | None = None
) -> dict[str, Spectrum]:
    """Random curvatures, singular ones too, for blocks of these shapes.

    Args:
        shapes: `(out, in)` of every block.
        products: of two Kronecker factors, or (False) dense; None is either, block by block.
    """
    generator = torch.Generator().manual_seed(draw(seeds()))
    made = {}
    for name, (out, into) in shapes.items():
        product = draw(st.booleans()) if products is None else products
        sizes = (out, into) if product else (out * into,)
        factors = [
            torch.randn(n, draw(st.integers(1, n)), generator=generator, dtype=torch.float64) for n in sizes
        ]
        left, right = (m @ m.mT for m in (factors[0], factors[-1]))
        made[name] = product_spectrum(left, right) if product else dense_spectrum(left)
    return made


@st.composite
def chains(
    draw: Draw,
    shapes: Mapping[str, tuple[int, int]],
    *,
    stages: Sequence[str] = ("project", "compress", "adam", "adafactor", "unit_normalize"),
    max_stages: int = 4,
) -> Chain:
    """Chains of random stages, with random moments that fit, for blocks of these shapes.

    Args:
        shapes: `(out, in)` of every block, the bias column included.
        stages: what to draw from; "precondition" and "joint" are others.
        max_stages: how many stages at most.
    """
    now = dict(shapes)
    made: list[Transform] = []
    for kind in draw(st.lists(st.sampled_from(stages), max_size=max_stages)):
        seed = draw(seeds())
        generator = torch.Generator().manual_seed(seed)
        if kind == "project":
            dims = draw(st.integers(1, 6)), draw(st.integers(1, 6))
            made.append(Project(dims, draw(st.sampled_from(KINDS)), seed))
            now = {name: (min(dims[0], out), min(dims[1], fan_in)) for name, (out, fan_in) in now.items()}
        elif kind == "compress":
            dim = draw(st.integers(1, 12))
            made.append(Compress(dim, draw(st.sampled_from(KINDS)), seed))
            now = {name: (1, dim) if dim < prod(shape) else shape for name, shape in now.items()}
        elif kind == "joint":
            made.append(joint())
            now = {JOINT: (1, sum(prod(shape) for shape in now.values()))}
        elif kind == "unit_normalize":
            made.append(unit_normalize())
        elif kind == "precondition":
            power, damping = draw(st.sampled_from([-1.0, -0.5])), draw(dampings())
            made.append(precondition(draw(spectra(now)), power, damping))
        else:
            moments = {
                name: torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
                for name, shape in now.items()
            }
            made.append(adam(moments) if kind == "adam" else adafactor(moments))
    return chain(*made)


def shapes_of(blocks: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """The shape of one row of every dense block.

    >>> shapes_of({"a": torch.zeros(7, 2, 3)})
    {'a': (2, 3)}
    """
    return {name: (G.shape[-2], G.shape[-1]) for name, G in blocks.items()}
