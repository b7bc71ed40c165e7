"""The commands of `tcd-train`, one module each.

Each module has HELP, a line of help; `add_arguments`, which declares the arguments; and `execute`, which runs the
command and returns the exit code. Slow imports are inside `execute`, so that `--help` and typing errors do not wait for
torch.
"""

COMMANDS = ("cache", "check", "export", "inspect", "report", "run", "sample")

RESUMABLE = ("cache", "run")
"""The commands that save their progress and resume when they are run again."""
