"""Kernels behind the ops. Importing this package registers the reference, which serves every device, and the kernels of
each device that has some; it touches no device.
"""

from . import cpu, cuda, reference

__all__ = ["cpu", "cuda", "reference"]
