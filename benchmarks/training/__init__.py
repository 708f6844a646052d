"""What train.py is made of: one small U-Net trained with BCE, with Dice + BCE, and with the edge term added."""
