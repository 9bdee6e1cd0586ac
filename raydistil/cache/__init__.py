"""The teacher's targets, kept: written once as Parquet, read in every epoch. See `columns` for the files' schema."""
