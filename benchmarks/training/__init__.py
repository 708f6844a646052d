"""What train.py is made of: one small U-Net trained with and without the contrastive terms."""
