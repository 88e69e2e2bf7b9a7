"""Recipes: each module is one training run, to be read from top to bottom."""
