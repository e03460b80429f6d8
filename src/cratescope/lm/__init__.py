"""Language modelling: text to tokens, training, evaluation."""
