"""Feature stores as folders of Parquet files, on this machine or in an object store."""
