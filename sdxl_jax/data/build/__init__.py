"""Shards, made once from pictures of any source. Training reads them and never this."""
