"""The embedded tiny model: the world of captioned shapes it was trained on, and its training script."""
