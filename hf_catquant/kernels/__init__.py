"""Kernels behind the ops. Importing this package registers the reference, which serves every device."""

from . import reference

__all__ = ["reference"]
