"""gradfn beside other packages: their benchmarks, interfaces and models. None of them is a dependency."""

from gradfn.bridges import captum, dattri, nnsight, quanda, transformer_lens

__all__ = ["captum", "dattri", "nnsight", "quanda", "transformer_lens"]
