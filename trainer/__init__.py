"""Training recipes for the networks that logshift runs."""
