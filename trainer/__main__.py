"""`python -m trainer` is the same as `tcd-train`."""

import sys

from trainer.cli import main

sys.exit(main())
