"""Kernels behind the ops. Importing this package registers the reference, which serves every device, and those that
are faster."""

from . import cpu, reference

__all__ = ["cpu", "reference"]
