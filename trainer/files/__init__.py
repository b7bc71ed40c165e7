"""LoRA files: reading, writing, describing, converting and merging them."""
