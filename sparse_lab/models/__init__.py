"""Plain PyTorch networks, built by name.

Nothing here knows of sparsity, Lightning or Hydra. Every activation and pool of this project's own networks is a module
of its own, so that each can be replaced alone; none works in place, so that a hook may keep what it sees (in place is
at most 2% faster on CPU and saves no memory that autograd holds). Parameters are named as torchvision names them.
Importing this room does not import torch.
"""

from __future__ import annotations

from sparse_lab.models.registry import LIBRARIES, build, check, is_foreign, make, names, options_of, register_model
from sparse_lab.models.spec import Spec, frozen

__all__ = [
    "LIBRARIES",
    "Spec",
    "build",
    "check",
    "frozen",
    "is_foreign",
    "make",
    "names",
    "options_of",
    "register_model",
]
