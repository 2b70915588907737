"""What `import ncsn` offers, see docs/library.md."""
