"""``python -m hf_catquant.cli``."""

import sys

from . import main

sys.exit(main())
