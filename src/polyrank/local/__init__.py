"""What runs beside the data: the base model, adapters attached to it, and the training loop."""
