"""Readers of finished runs: what a search found, in numbers and pictures. The one part that imports `darts_space`."""
