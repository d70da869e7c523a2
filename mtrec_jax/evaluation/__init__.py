"""What is measured, and by which rules: metrics, calibration, and the ranking protocol."""
