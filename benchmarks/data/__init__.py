"""Photographs with their lesion masks, read or drawn, and the crops of them: for every command that needs some."""
