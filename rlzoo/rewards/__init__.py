"""Rewards. No imports here: every verifier worker imports this package and must start fast."""
