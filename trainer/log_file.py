"""Also write what a run logs into a file, with times."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "log.txt"


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Within the block, append what is logged to a file, and also the message of an exception that ends it."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("trajectory-consistency")
    log.addHandler(handler)
    try:
        yield
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
        handler.handle(logging.LogRecord(log.name, logging.ERROR, __file__, 0, said, None, None))
        raise
    finally:
        log.removeHandler(handler)
        handler.close()
