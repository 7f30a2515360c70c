"""One file, one page of the explorer."""
