"""One file, one panel of the feature page; `dashboards.pages` says what a file declares."""
