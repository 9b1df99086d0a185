"""Drafting tokens ahead of the model, so that one step verifies several."""
