"""Images from their source to rows in Parquet, and from there to memory."""
