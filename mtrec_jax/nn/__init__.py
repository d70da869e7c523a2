"""The model: layers, tables, encoders, towers and fusion. Flax is known here and nowhere else."""
