"""Training after, or while, pruning: on transformers' own `Trainer`."""
