"""A small ViT, and generated scenes with exact labels; nothing is downloaded."""
