"""The commands of `tcd-train`, one module to each.

A module has HELP, one line; `add_arguments`, which declares what its command takes; and `execute`, which does it and
imports what is heavy only then, so that `--help` and a typo do not wait for the model libraries.
"""

COMMANDS = ("cache", "check", "export", "inspect", "report", "run", "sample")

LASTING = ("cache", "run")
"""Those that save as they go, and when started again go on from there."""
