"""Task towers: a file each."""
