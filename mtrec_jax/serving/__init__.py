"""The trained model for its users."""
