"""Products of rows sorted by expert with each expert's own weight."""
