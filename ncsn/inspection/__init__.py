"""What is in a store and its registry, and what nothing there refers to."""
