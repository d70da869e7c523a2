"""Balancing of tasks: a file a method."""
