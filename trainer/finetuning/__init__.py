"""What fine-tuning adds to a step: parameters that are not trained, and the loss of pairs of answers."""
