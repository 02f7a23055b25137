"""Shards, made once from images of any source. Training reads them and never this."""
