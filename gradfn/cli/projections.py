"""What --projection and --projection-dim say."""

from typing import Any, get_args

from gradfn.cli.inputs import Options
from gradfn.errors import InputError
from gradfn.linalg.maps import Kind
from gradfn.runs.curvatures import open_curvature
from gradfn.runs.masks import LOADERS, projection_named
from gradfn.runs.provenance import Provenance, rebuild
from gradfn.transforms import Chain, chain
from gradfn.transforms.project import Compress, Project
from gradfn.transforms.projection import lenient


def projection_of(options: Options, default: str) -> Chain:
    """The projection that is asked for: spelled whole, or a kind and a dimension; else the curvature's.

    What is spelled with its dimensions must make some block smaller.

    Args:
        default: what it is where neither the options nor --hessian-path say.

    Raises:
        InputError: dimensions twice, or a spelling that says nothing.
    """
    kind, dim, seed = options["projection"], options["projection_dim"], options["seed"]
    if kind is not None and kind not in get_args(Kind):
        if dim is not None:
            raise InputError(f"--projection {kind!r} is whole by itself: leave out --projection-dim")
        return projection_named(kind, seed)
    if dim is not None and dim < 0:
        raise InputError(f"the projection dimension must be 0 (the full gradient) or more, not {dim}")
    if dim == 0 and kind is not None:
        raise InputError(
            f"--projection-dim 0 is the full gradient, which has no {kind}: leave one of them out"
        )
    if dim == 0:
        return projection_named("none")
    if dim is None and kind is None and options["hessian_path"] is not None:
        stages = _of_curvature(options["hessian_path"])
        # The tokens that masked-lm masks are drawn with the same seed, and are not the curvature's affair.
        if seed and str(options["task"]) != "masked_lm":
            _refuse_other_seed(options["hessian_path"], stages, seed)
        return stages
    if dim is None and kind is None:
        return lenient(projection_named(default, seed))
    side = 16 if dim is None else dim
    return lenient(projection_named(f"{kind or 'rademacher'}:{side}x{side}", seed))


def _of_curvature(path: str) -> Chain:
    """The projection that a curvature was fitted behind, with its seed."""
    with open_curvature(path) as store:
        stages = [stage for stage in Provenance.of(store).stages if "projection" in stage]
    return chain(rebuild({"transform": {"chain": stages}}, loaders=LOADERS))


def _refuse_other_seed(path: str, stages: Chain, seed: int) -> None:
    """Refuse a seed that would not be used, since the curvature's projection has its own."""
    drawn = {stage.seed for stage in stages.stages if isinstance(stage, Project | Compress)}
    if drawn and seed not in drawn:
        raise InputError(
            f"--seed {seed} is not that of the projection of the curvature in {path}, which is "
            f"{', '.join(map(str, sorted(drawn)))}: leave it out"
        )


def with_projection(options: Options, default: str) -> dict[str, Any]:
    """The options, with the projection itself in place of what they say about it."""
    return {**options, "projection": projection_of(options, default), "projection_dim": None}
