"""DSpark: DFlash's block, with a head that joins each token to the one before it."""
