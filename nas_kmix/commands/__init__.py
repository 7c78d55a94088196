"""The commands behind search.py and train_eval.py: flags in, a run folder and a summary out."""
