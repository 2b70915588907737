"""What is no step of the pipeline: figures, planning, registered models, preparation, the toy example."""
