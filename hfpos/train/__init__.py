"""Training causal models on blocks of token ids."""
