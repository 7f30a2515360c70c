"""The harvest on disk: layout, ledger, chunk files, Zarr arrays; reading and writing them."""
