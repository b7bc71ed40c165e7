"""The models to distill: what the trainer asks of one, and the engines that answer."""
