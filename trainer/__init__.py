"""A standalone trainer that distills a diffusion model into a TCD LoRA, which the nodes of this repository load."""

import logging

# If peft and bitsandbytes are installed, diffusers imports both. bitsandbytes then warns about a missing kernel for
# 4-bit weights, which are not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
