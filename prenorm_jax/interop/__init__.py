"""Checkpoints from elsewhere: file formats, conversion in place of names, what is in them."""
