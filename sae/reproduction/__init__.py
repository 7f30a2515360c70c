"""What the reproduction of a paper is made of: trials that are kept, claims beside nulls."""
