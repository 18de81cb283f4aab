"""Draws of tokens from rows of logits: request, law, filters, driver, public call."""
