"""Demonstrations: LeRobot format in, batches out."""
