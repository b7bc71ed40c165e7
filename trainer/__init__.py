"""A standalone trainer that distills a diffusion model into a TCD LoRA, which the nodes of this repository load."""
