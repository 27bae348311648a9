"""What runs layers: where weights are, hidden states between layers, exact backward passes, statistics."""
