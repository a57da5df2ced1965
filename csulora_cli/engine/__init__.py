"""What runs models and streams checkpoints: the host, its inputs, the measurements, the two sources of directions."""
