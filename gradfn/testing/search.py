"""The search for the smallest case that breaks a law, and its description."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky, HypothesisException
from torch import Tensor, nn

Case = TypeVar("Case")
FEW = 12
"""How many numbers of a tensor are shown (of a longer one, its shape), and how many rows."""


class BrokenLawError(AssertionError):
    """A law that a case breaks; the message shows both."""


def refute(
    check: str, law: Callable[[Case], str], cases: st.SearchStrategy[Case], max_examples: int = 40
) -> None:
    """Search for a case that breaks a law, make it small, and raise it. The cases are the same every time.

    Args:
        check: the function that the user called, with which the message begins.
        law: says what is wrong with a case, or "" if nothing is; an error counts as wrong too.
        cases: where to draw cases from; a frozen dataclass shows its fields.
        max_examples: how many.

    Raises:
        BrokenLawError: the check, what is wrong, and the smallest case found.

    >>> refute("check_small", lambda n: "" if n < 7 else f"{n} is not small", st.integers(0, 99))
    Traceback (most recent call last):
    gradfn.testing.search.BrokenLawError: check_small: 7 is not small
      case: 7
    """

    # Deterministic, so that a failure in CI can be repeated; shrunk in every profile.
    @settings(
        max_examples=max_examples, deadline=None, derandomize=True, database=None, print_blob=False,
        report_multiple_bugs=False, phases=(Phase.generate, Phase.shrink),
        suppress_health_check=tuple(HealthCheck),  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    @given(cases)
    def search(case: Case) -> None:
        try:
            wrong = law(case)
        except HypothesisException:
            raise
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
            raise BrokenLawError(f"{check}: {wrong}\n{describe(case)}") from error
        if wrong:
            raise BrokenLawError(f"{check}: {wrong}\n{describe(case)}")

    try:
        search()
    except BrokenLawError as broken:
        raise BrokenLawError(str(broken)) from broken.__cause__  # without Hypothesis's own notes
    except Flaky as flaky:
        raise BrokenLawError(
            f"{check}: the same case failed once and passed once, so it is not a function of its inputs: "
            "seed what is random"
        ) from flaky


def first(laws: Iterable[Callable[[Case], str]], case: Case) -> str:
    """The message of the first law that a case breaks, or "".

    >>> first([lambda n: "", lambda n: "odd" if n % 2 else ""], 3)
    'odd'
    """
    return next((wrong for law in laws if (wrong := law(case))), "")


def describe(case: Any) -> str:
    """The case in text, one line a field.

    >>> print(describe(3))
      case: 3
    """
    if not is_dataclass(case) or isinstance(case, type):
        return f"  case: {short(case)}"
    lines = []
    for field in fields(case):
        value = getattr(case, field.name)
        if field.metadata.get("shown", True):
            is_rows = isinstance(value, list) and value and isinstance(value[0], Mapping)
            lines += (
                [f"  {field.name} {i}: {short(row)}" for i, row in enumerate(value[:FEW])]
                if is_rows
                else [f"  {field.name}: {short(value)}"]
            )
            if is_rows and len(value) > FEW:
                lines.append(f"  {field.name}: {len(value) - FEW} more")
    return "\n".join(lines)


def short(value: Any) -> str:
    """A value on one line: modules without their defaults, long tensors as their shape.

    >>> import torch
    >>> short({"x": torch.tensor([0.5, 1.0]), "y": torch.zeros(4, 5)})
    '{x: [0.5, 1.0], y: zeros [4, 5]}'
    >>> short(nn.Sequential(nn.Linear(3, 1, bias=False), nn.Tanh()))
    'Sequential(Linear(3, 1, bias=False), Tanh())'
    """
    if isinstance(value, nn.Module):
        return _short_module(value, set())
    if isinstance(value, Tensor):
        return _short_tensor(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {short(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(short, value)) + "]"
    if is_dataclass(value) and not isinstance(value, type):
        return _short_dataclass(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__qualname__.split(".<locals>")[0]
    return str(value) if type(value).__repr__ is not object.__repr__ else f"{type(value).__name__}()"


def _short_tensor(value: Tensor) -> str:
    if value.numel() <= FEW:
        return str(value.double().round(decimals=4).tolist() if value.is_floating_point() else value.tolist())
    return f"{'zeros' if not bool(value.any()) else 'tensor'} {list(value.shape)}"


def _short_dataclass(value: Any) -> str:
    shown = [
        f"{field.name}={short(own)}"
        for field in fields(value)
        if not isinstance(own := getattr(value, field.name), nn.Module)
        and not (isinstance(own, str | bool | int | float | None) and own == field.default)
    ]
    return f"{type(value).__name__}({', '.join(shown)})"


def _short_module(module: nn.Module, seen: set[int]) -> str:
    if isinstance(module, nn.Sequential):
        return f"Sequential({', '.join(_short_module(part, seen) for part in module)})"
    name = type(module).__name__
    parameters = list(module.parameters())
    again = bool(parameters) and all(id(p) in seen for p in parameters)
    seen.update(id(p) for p in parameters)
    if isinstance(module, nn.Linear):
        bias = "" if module.bias is not None else ", bias=False"
        name = f"Linear({module.in_features}, {module.out_features}{bias})"
    elif not list(module.children()):
        name = repr(module)
    elif (config := getattr(module, "config", None)) is not None:
        width = getattr(config, "hidden_size", None)
        name = f"{name}({config.num_hidden_layers} layers of width {width})"
    return f"{name} again" if again else name
