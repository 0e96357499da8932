"""The package's logger: progress and warnings go to standard error, one line each; ``logging`` can silence them."""

from __future__ import annotations

import logging

logger = logging.getLogger("hf_catquant")
if not logger.handlers:
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
