"""The commands next to the steps."""
