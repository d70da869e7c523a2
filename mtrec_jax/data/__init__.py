"""From raw logs to batches: preparation, the prepared folder, the input pipeline, public data."""
