"""Train a head on a dataset."""
