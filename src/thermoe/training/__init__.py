"""Training on the Hugging Face Trainer: settings, losses, callbacks, and a whole run from a configuration."""
