"""Encoders of behaviour: a file each."""
