"""The commands of `tcd-train`, one module each.

A module has HELP, one line; `add_arguments`, which declares the arguments; and `execute`, which runs the command and
returns the exit code. Heavy imports are inside `execute`, so that `--help` and typos do not wait for torch.
"""

COMMANDS = ("cache", "check", "export", "inspect", "report", "run", "sample")

RESUMABLE = ("cache", "run")
"""The commands that save their progress and resume when they are run again."""
