"""`python -m trajectory_consistency.trainer` is the same as `tcd-train`."""

import sys

from .cli import main

sys.exit(main())
