"""Worlds that can be reset and stepped, and nothing about learning."""
