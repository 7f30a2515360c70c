"""Features of a store in the formats of other tools; each format is a file."""
