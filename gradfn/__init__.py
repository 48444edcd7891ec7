"""gradfn: which training examples made the model do this?

Per-example gradients as pure functions on `torch.func`; every attribution method is a chain of pure
transforms, project -> normalize -> precondition -> score. Names load when they are first used.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
