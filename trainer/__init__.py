"""A standalone trainer that distills a diffusion model into a TCD LoRA, which the nodes of this repository load."""

import logging

# diffusers imports peft, which imports bitsandbytes, if they are installed; that warns about a missing kernel for
# 4-bit weights, which are not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
