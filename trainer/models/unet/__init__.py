"""SD1.5, SD2.x and SDXL, read through diffusers."""
