"""Runnable examples of di4c_fast."""
