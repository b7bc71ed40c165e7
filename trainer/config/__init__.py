"""The settings of a run: what a TOML file may say, checked, and what of it is the machine's."""
