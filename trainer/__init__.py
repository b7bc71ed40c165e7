"""A standalone trainer that distills a diffusion model into a TCD LoRA, which the nodes of this repository load."""

import logging

# peft imports bitsandbytes where that is installed, which then warns of a kernel for weights of 4 bits: none are here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
