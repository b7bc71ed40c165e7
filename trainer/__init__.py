"""A standalone trainer that distills a diffusion model into a TCD LoRA, which the nodes of this repository load."""

import logging
import sys

# Every entry point imports this first. pip does not say it, because the nodes, in the same package, run on Python 3.10.
if sys.version_info < (3, 11):
    sys.exit(f"error: the trainer needs Python 3.11 or newer, and this is Python {sys.version.split()[0]}")

# If peft and bitsandbytes are installed, diffusers imports both. bitsandbytes then warns about a missing kernel for
# 4-bit weights, which are not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
