"""What run.py and kernels.py are made of: what the losses cost."""
