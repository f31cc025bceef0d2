"""Hugging Face models: where their feed-forward networks sit, and how they become Mixture-of-Experts."""
