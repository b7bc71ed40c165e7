"""Safetensors files: read, and written so that they are complete or absent. Needs safetensors beside torch."""
