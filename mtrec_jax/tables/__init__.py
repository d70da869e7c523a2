"""Embedding tables: who owns which rows, their lookup, and their update."""
