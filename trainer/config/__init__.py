"""The configuration of a run: its settings, their checks, the recipes, and the choice of device and dtype."""
