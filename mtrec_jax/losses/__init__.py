"""What the model is taught by: losses of tasks, retrieval and fusion."""
