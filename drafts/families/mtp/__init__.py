"""MTP: the layer that a target brings itself to predict one token more."""
