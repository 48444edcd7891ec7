"""What is done to gradients as it is asked for: optimizer normalisation, projection, curvature, norm."""

from dataclasses import dataclass, replace
from typing import Any, get_args

from gradfn.cli.inputs import Loaded, anchored
from gradfn.cli.options import CurvatureOptions, GradientOptions
from gradfn.errors import InputError
from gradfn.hf.optimizer_state import load_optimizer_state
from gradfn.linalg.maps import Kind
from gradfn.linalg.spectrum import Damping
from gradfn.runs.curvatures import curvature_for, open_curvature
from gradfn.runs.masks import LOADERS, projection_named, refuse_foreign
from gradfn.runs.provenance import Provenance, rebuild
from gradfn.statistics.curvature import Curvature
from gradfn.transforms import Chain, Transform, chain, precondition, unit_normalize
from gradfn.transforms.project import Compress, Project
from gradfn.transforms.projection import lenient


def projection_of(
    gradients: GradientOptions, seed: int, default: str, curvature: str | None = None, masks: bool = False
) -> Chain:
    """The projection that is asked for: spelled whole, or a kind and a dimension; else the curvature's.

    Dimensions that are given must make some block smaller.

    Args:
        seed: the key of what is drawn.
        default: what it is where neither the options nor the curvature say.
        curvature: the run directory of a curvature.
        masks: whether the seed draws masks of tokens too, which are no concern of the curvature's.

    Raises:
        InputError: dimensions twice, or a spelling that says nothing.
    """
    kind, dim = gradients.projection, gradients.projection_dim
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
    if dim is None and kind is None and curvature is not None:
        return _of_curvature(curvature, 0 if masks else seed)
    if dim is None and kind is None:
        return lenient(projection_named(default, seed))
    side = 16 if dim is None else dim
    made = projection_named(f"{kind or 'rademacher'}:{side}x{side}", seed)
    return lenient(made) if dim is None else made


def _of_curvature(path: str, seed: int) -> Chain:
    """The projection that a curvature was fitted behind; refuses a seed of which it is not drawn."""
    with open_curvature(path) as store:
        stages = [stage for stage in Provenance.of(store).stages if "projection" in stage]
    found = chain(rebuild({"transform": {"chain": stages}}, loaders=LOADERS))
    drawn = {stage.seed for stage in found.stages if isinstance(stage, Project | Compress)}
    if seed and drawn and seed not in drawn:
        raise InputError(
            f"--seed {seed} is not that of the projection of the curvature in {path}, which is "
            f"{', '.join(map(str, sorted(drawn)))}: leave it out"
        )
    return found


def dampings_of(curvature: CurvatureOptions, *, fitted: bool = False) -> tuple[Damping, ...]:
    """The dampings of a curvature, which is looked at before anything else is loaded.

    Args:
        fitted: whether the method fits a curvature where none is given.

    Raises:
        InputError: no such curvature, or a damping without one.
    """
    if curvature.path is not None:
        open_curvature(curvature.path)
    elif curvature.damping is not None and not fitted:
        raise InputError("--damping belongs to a curvature: give --hessian-path, or a --method that fits one")
    return curvature.damping or (Damping(),)


@dataclass(frozen=True, eq=False)
class Stages:
    """What is done to every gradient before scores, and what a run records of where it came from.

    Args:
        normalize: the optimizer's normalisation, or nothing.
        projection: the random projection, or nothing.
        curvature: one that was fitted before.
        dampings: of a curvature.
        settings: the paths of what was read.
    """

    normalize: Transform
    projection: Transform
    curvature: Curvature | None
    dampings: tuple[Damping, ...]
    settings: dict[str, Any]

    @property
    def base(self) -> Chain:
        """Normalisation and projection."""
        return chain(self.normalize, self.projection)

    def query_side(self, unit: bool) -> Chain:
        """What `build` and `reduce` write: behind a curvature `H^-1 g`, or `H^-1/2 g` and the unit norm."""
        norm = [unit_normalize()] if unit else []
        if self.curvature is None:
            return chain(self.base, *norm)
        (damping,) = self.dampings
        power = precondition(self.curvature, -0.5 if unit else -1.0, damping)
        return chain(self.base, power, *norm)


def load_stages(
    loaded: Loaded, projection: Chain, state: str | None, curvature: CurvatureOptions | None = None
) -> Stages:
    """Read the optimizer state and the curvature.

    Args:
        state: the path of an optimizer's state.

    Raises:
        InputError: a curvature or a projection of another model, layers or transform.
    """
    normalize = chain() if state is None else normalizer(state, loaded)
    settings: dict[str, Any] = {} if state is None else {"optimizer_state": {"path": anchored(state)}}
    refuse_foreign(projection, normalize, loaded.settings())
    dampings = (curvature and curvature.damping) or (Damping(),)
    if curvature is None or curvature.path is None:
        return Stages(normalize, projection, None, dampings, settings)
    wanted = {**loaded.settings(), "transform": chain(normalize, projection).settings()}
    H = curvature_for(curvature.path, wanted, dampings)
    settings["hessian"] = {"path": anchored(curvature.path)}
    return Stages(normalize, projection, H, dampings, settings)


def normalizer(path: str, loaded: Loaded) -> Transform:
    """The scaling of gradients that the optimizer had reached."""
    return load_optimizer_state(path, loaded.model, replace(loaded.subject.view, tokens=False))
