"""Dictionary learning: sparse autoencoders trained from a stream of activations."""
