"""Training a draft or its adapter on a feature store."""
