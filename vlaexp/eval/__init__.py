"""Evaluate anything that is a Policy."""
