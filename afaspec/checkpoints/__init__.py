"""Draft checkpoints as a user meets them: inspect, init, merge."""
