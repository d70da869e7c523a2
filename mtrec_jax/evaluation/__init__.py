"""What is measured, and by which rules: metrics, ranking, and the protocol."""
