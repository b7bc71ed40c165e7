"""The embedded tiny family: its world of captioned shapes, and the script that trained its teacher."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "tiny-sd.safetensors"
