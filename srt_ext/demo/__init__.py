"""What needs no download: a small ViT, and scenes whose labels are exactly known to show it."""
