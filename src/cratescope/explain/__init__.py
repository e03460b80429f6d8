"""What is done to explain a neuron, and to predict its activations from the explanation."""
