"""Benches: `python -m rlzoo.bench NAME` prints a table, then one line of JSON."""
