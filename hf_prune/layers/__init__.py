"""The only part that runs layers: where weights live, hidden states between layers, exact backward passes, statistics."""
