"""The embedded tiny model: its world of captioned shapes, and the script that trained its teacher."""
