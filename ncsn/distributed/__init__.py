"""Everything that runs on Ray. Nothing outside this package imports ray."""
