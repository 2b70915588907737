"""From images to features and class probabilities: one module for each kind of extractor."""
