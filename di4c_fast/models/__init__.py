"""Models: how they are called, latents, students made from teachers."""
