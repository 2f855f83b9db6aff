"""A target on disk: its folder, its embedding and output layer, and the logits it makes."""
