"""Data sets on disk: records, shards, formats, tools."""
