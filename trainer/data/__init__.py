"""From pictures, captions and prompts to the latents and embeddings of each training step."""
