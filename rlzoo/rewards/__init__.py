"""Rewards. Kept empty of imports: every verifier worker imports this package and must start fast."""
