"""What train.py is made of: a small U-Net trained with BCE, with Dice + BCE, and with Dice + BCE and the edge term."""
