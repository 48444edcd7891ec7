"""Linear algebra of gradients: maps drawn from a key, Kronecker products, spectra."""

from gradfn.linalg.kron import Kron
from gradfn.linalg.maps import Kind, Map
from gradfn.linalg.spectrum import Damping, Spectrum, parse_dampings

__all__ = [
    "Damping",
    "Kind",
    "Kron",
    "Map",
    "Spectrum",
    "parse_dampings",
]
