"""What search.py and train_eval.py run: flags in, a run folder and a summary out."""
