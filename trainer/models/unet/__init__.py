"""The UNet engine: SD1.5, SD2.x and SDXL, loaded with diffusers."""
