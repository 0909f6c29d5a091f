"""Logs and catalogue: read, check, clean, split, write as records, stream as batches."""
