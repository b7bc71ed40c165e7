"""LoRA files: read, inspected, written."""
