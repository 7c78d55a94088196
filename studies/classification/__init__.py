"""Cells of the paper's tables of classification errors, run seed by seed and set beside the paper's figures."""
