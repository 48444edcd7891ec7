"""Projections as they are spelled, in one line, on the command line and in what a run records.

    mask:128x128 > sjlt:4096

| spelling | what it does |
|---|---|
| `KIND:AxB` | both sides of every block, before the dense gradient exists: `[out, in] -> [A, B]` |
| `KIND:K` | the flattened block: `[out, in] -> [1, K]` |
| `sjlt:K:S` | S nonzeros a column |
| `joint` | all blocks of a row become one; what follows acts on the whole gradient |
| `pca:AxB:RUN` | onto the leading eigenvectors of a fitted K-FAC curvature |
| `selective:RUN` | the coordinates that `gradfn mask fit` chose |
| `logra:AxB` | `gaussian:AxB` |
| `grass:K`, `factgrass:K` | `mask:4K > sjlt:K`; `mask:DxD > sjlt:K`, where D is the root of 4K |

KIND is rademacher, gaussian, orthonormal, mask, sjlt or fjlt; ` > ` separates stages. A RUN with a `>` or a
`"` in it stands in double quotes, in which a `"` is written twice: `selective:"my>run"`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from gradfn.errors import InputError
from gradfn.linalg.maps import Kind, square_side
from gradfn.random import words
from gradfn.transforms.chain import Chain, Transform, chain
from gradfn.transforms.joint import joint
from gradfn.transforms.project import Compress, Project, compress, project

FACTOR = 4
"""A mask keeps so many times the numbers that a sparse transform behind it gives (GraSS, section 3.2)."""

Loaders = Mapping[str, Callable[[str], Transform]]
"""Stages that were fitted, by their first word: functions of what follows it."""
BETWEEN = re.compile(r'>(?=(?:[^"]*"[^"]*")*[^"]*$)')
"""A `>` outside of quotes: one with an even number of them behind it."""


def parse_projection(text: str, seed: int = 0, loaders: Loaders | None = None) -> Chain:
    """The transform that a spelling stands for.

    Args:
        text: stages with ` > ` between them, see above; "none" is the full gradient.
        seed: key of what is drawn.
        loaders: for stages that are read from a run.

    Raises:
        InputError: what is wrong with which stage, and what would be right.

    >>> parse_projection("mask:128x128 > sjlt:4096").stages[1]
    Compress(dim=4096, kind='sjlt', seed=0, nonzeros=1)
    >>> parse_projection("factgrass:4096") == parse_projection("mask:128x128 > sjlt:4096")
    True
    """
    if text.strip() == "none":
        return chain()
    if text.count('"') % 2:
        raise InputError(f"""{text!r} has a quote that is not closed: write selective:"my>run", say""")
    parts = [part.strip() for part in BETWEEN.split(text)]
    _check_parts(text, parts)
    return chain(*(_stage(part, seed, loaders or {}) for part in parts))


def _check_parts(text: str, parts: Sequence[str]) -> None:
    """Refuse stages that cannot stand where they are."""
    if "" in parts:
        raise InputError(f"{text!r} has an empty stage: write one on each side of a >, or none alone")
    if "none" in parts:
        raise InputError(f"none is the full gradient and stands alone, not in {text!r}: leave it out")
    if parts.count("joint") > 1:
        raise InputError(f"joint makes one block of all, and {text!r} has it twice: leave one out")


def quoted(path: str) -> str:
    """A path as a spelling has it: in quotes where it would be read otherwise.

    >>> quoted("my>run"), quoted("runs/mask")
    ('"my>run"', 'runs/mask')
    """
    plain = path == path.strip() and not {*path} & {*'">'}
    return path if plain else '"' + path.replace('"', '""') + '"'


def _unquoted(text: str) -> str:
    return re.sub(r'"((?:[^"]|"")*)"', lambda found: found[1].replace('""', '"'), text)


def _stage(text: str, seed: int, loaders: Loaders) -> Transform:
    word, colon, rest = text.partition(":")
    if word == "joint":
        if colon:
            raise InputError(f"joint takes no number, as in {text!r}: write joint > sjlt:4096, say")
        return joint()
    if word in loaders:
        return loaders[word](_unquoted(rest))
    if word in SHORT:
        return _short(text, word, rest, seed)
    if word not in get_args(Kind):
        known = ", ".join((*get_args(Kind), *SHORT, "joint", *loaders, "none"))
        raise InputError(f"no projection {word!r} in {text!r}: choose {known}")
    dims, nonzeros = _numbers(text, rest)
    make: Any = compress if isinstance(dims, int) else project
    return make(dims, word, seed, nonzeros)


def _short(text: str, word: str, rest: str, seed: int) -> Transform:
    """What a short spelling stands for; of nonzeros only the long one tells."""
    dims, nonzeros = _numbers(text, rest, pair=word == "logra")
    made = SHORT[word](dims, seed)
    if rest.count(":"):
        long = spell(made)
        told = f"{long}:{nonzeros}" if "sjlt" in long else long
        raise InputError(f"{word} takes no number of nonzeros, as in {text!r}: write {told}")
    return made


def is_number(text: str) -> bool:
    """Whether a text is a whole number that is not absurd, from 1 to 9 digits.

    >>> is_number("64"), is_number("-1"), is_number("9" * 5000)
    (True, False, False)
    """
    return re.fullmatch(r"\d{1,9}", text, re.ASCII) is not None


def _numbers(text: str, rest: str, pair: bool | None = None) -> tuple[Any, int]:
    """`AxB`, `K` and `K:S` as numbers."""
    first, colon, last = rest.partition(":")
    parts = first.split("x")
    numbers = [*parts, *([last] if colon else [])]
    wanted = (1, 2) if pair is None else (1 + pair,)
    plain = all(is_number(part.strip()) for part in numbers)
    if len(parts) not in wanted or not plain:
        word = text.partition(":")[0]
        forms = {2: f"{word}:64x64 for both sides of every block", 1: f"{word}:4096 for the flattened block"}
        told = " or ".join(form for count, form in forms.items() if count in wanted)
        raise InputError(f"{text!r} is no projection: give {told}")
    dims = [int(part) for part in parts]
    return (dims[0] if len(dims) == 1 else (dims[0], dims[1])), int(last) if colon else 1


def lenient(projection: Transform) -> Chain:
    """The same, but where it makes no block smaller it does nothing instead of being refused.

    >>> import torch
    >>> lenient(project((9, 9)))({"a": torch.ones(1, 2, 2)})["a"].shape
    torch.Size([1, 2, 2])
    """
    stages = chain(projection).stages
    return chain(*(replace(s, strict=False) if isinstance(s, Project | Compress) else s for s in stages))


def reseeded(projection: Transform, checkpoint: int) -> Chain:
    """The same projection, drawn from a seed of its own for each of several checkpoints of a model.

    Checkpoint 0 keeps the seed s. The seed of checkpoint m > 0 is the first word drawn by the key
    ("checkpoint", s, m), without its last 33 bits. No inner product has rows of two checkpoints, so each may
    have its own projection, and the projections' noise averages out in a sum over checkpoints, like that of
    one projection with more numbers.

    Args:
        projection: of one checkpoint.
        checkpoint: the number of the checkpoint, from 0.

    >>> [stage.seed for stage in reseeded(project(4, seed=7), 0).stages]
    [7]
    >>> reseeded(project(4), 1) == reseeded(project(4), 2)
    False

    Source: TRAK's code, which draws a projection for each model.
    """

    def own(seed: int) -> int:
        return int(words(1, "checkpoint", seed, checkpoint)[0] >> 33) if checkpoint else seed

    stages = chain(projection).stages
    return chain(*(replace(s, seed=own(s.seed)) if isinstance(s, Project | Compress) else s for s in stages))


def logra(dims: tuple[int, int], seed: int = 0) -> Transform:
    """LoGra: a Gaussian projection of both factors.

    >>> str(logra((8, 8)))
    'gaussian:8x8'

    Source: arXiv:2405.13954, section 3.1.
    """
    return project(dims, "gaussian", seed)


def grass(k: int, seed: int = 0) -> Chain:
    """GraSS: a mask to 4k coordinates of the flattened block, then an sjlt to k.

    >>> spell(grass(64))
    'mask:256 > sjlt:64'

    Source: arXiv:2505.18976, section 3.2.
    """
    return chain(lenient(compress(FACTOR * k, "mask", seed)), compress(k, "sjlt", seed))


def factgrass(k: int, seed: int = 0) -> Chain:
    """FactGraSS: masks of both factors to `sqrt(4k)`, the outer product of what is left, an sjlt to k.

    >>> spell(factgrass(64))
    'mask:16x16 > sjlt:64'

    Source: arXiv:2505.18976, section 3.3.
    """
    side = square_side(FACTOR * k)
    return chain(lenient(project((side, side), "mask", seed)), compress(k, "sjlt", seed))


SHORT: Mapping[str, Callable[[Any, int], Transform]] = {
    "logra": logra,
    "grass": grass,
    "factgrass": factgrass,
}


def spell(projection: Transform) -> str:
    """A projection in one line, which `parse_projection` reads.

    >>> spell(parse_projection("joint > sjlt:64:2"))
    'joint > sjlt:64:2'
    """
    return " > ".join(map(str, chain(projection).stages)) or "none"
