"""What study.py and summary.py are made of: whether the losses help, on IDRiD."""
