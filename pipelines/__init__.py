"""KFP pipelines made of the components."""
