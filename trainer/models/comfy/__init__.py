"""The engine for every model that ComfyUI samples: its networks, text encoders and VAEs, loaded by its own code."""
