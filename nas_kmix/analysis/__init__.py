"""Readers of finished runs: what a search found, in numbers and pictures."""
