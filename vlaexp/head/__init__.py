"""Action heads: hidden states of a base model in, action chunks out."""
