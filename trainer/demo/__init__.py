"""The demo: distills the embedded tiny model, samples with the LoRAs and evaluates the pictures, in one command."""
