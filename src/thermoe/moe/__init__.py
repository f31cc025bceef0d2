"""The Mixture-of-Experts layer: experts, dispatch, losses and statistics. Nothing here knows about energy."""
