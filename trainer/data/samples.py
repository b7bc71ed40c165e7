"""A picture with its caption as a source yields it, or the reason why it cannot be used or is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

NO_CAPTION, NOT_UTF8 = "have no caption", "have a caption that is not UTF-8"
MAX_CAPTION = 10_000
"""The number of characters of the longest caption that is read. A prompt has a few hundred to thousand; some other
file, taken for a caption, would be encoded in thousands of chunks of tokens."""
TOO_LONG = f"have a caption of more than {MAX_CAPTION} characters"
"""Problems of samples; each completes a message "3 of 9 pictures ..."."""
JOINED = "captions of several lines, joined into one line"
"""A note; each completes a message "...: 3 (a.png, b.png, c.png)"."""


class Sample(NamedTuple):
    """A picture and its caption, or the problem with them."""

    name: str
    """The sample's name in messages."""
    read: Callable[[], bytes]
    """Returns the bytes of the image file; raises OSError if it cannot be read."""
    caption: str = ""
    """The caption in one line, without surrounding blanks; empty if there is a problem."""
    problem: str = ""
    """Why the sample cannot be used, such as NO_CAPTION; empty if no problem is known before the picture is read."""
    note: str = ""
    """What is counted and named about the sample in every report, such as JOINED; empty if there is nothing."""
    left_out: bool = False
    """Whether this is no sample, but a file that is not read, for the reason in `note`."""
    repeats: int = 1
    """How often an epoch shows the picture, relative to the other pictures of the source."""


def make_sample(name: str, read: Callable[[], bytes], text: bytes | None, repeats: int = 1) -> Sample:
    """Make a sample from a picture and the bytes of its caption, None if missing; a blank caption counts as missing."""
    try:
        lines = [] if text is None else [line.strip() for line in text.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        return Sample(name, read, problem=NOT_UTF8)
    if not lines:
        return Sample(name, read, problem=NO_CAPTION)
    caption = " ".join(lines)
    if len(caption) > MAX_CAPTION:
        return Sample(name, read, problem=TOO_LONG)
    return Sample(name, read, caption, note=JOINED if len(lines) > 1 else "", repeats=repeats)
