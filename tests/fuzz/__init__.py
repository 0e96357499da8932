"""Broken and hostile checkpoints: how they are made (mutate.py) and what may happen with them (judge.py)."""
