"""Recipes: what can be asked for, found, read, overridden, and remembered as inputs."""
