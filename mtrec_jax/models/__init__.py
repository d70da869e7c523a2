"""The model: inputs, encoder, towers and fusion, as pure functions."""
