"""One file, one page of the explorer; `dashboards.pages` says what a file declares."""
