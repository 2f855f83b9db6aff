"""The feature store: token ids, loss masks and hidden states in shards."""
