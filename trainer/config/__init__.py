"""The configuration of a run: reading and validating it, and choosing device and dtype."""
