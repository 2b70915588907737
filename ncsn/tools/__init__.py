"""Everything that is not a pipeline step: figures, planning, registered models, preparation, the toy example."""
