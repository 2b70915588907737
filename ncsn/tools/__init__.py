"""Everything that is not a pipeline step: first configs, planning, listing, cleaning up."""
