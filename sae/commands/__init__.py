"""The commands about SAEs: their configuration, and the function behind each."""
