"""The demo: one command from the tiny teacher to a TCD LoRA, its pictures and their measures."""
