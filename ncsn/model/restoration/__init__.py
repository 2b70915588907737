"""Images from incomplete, small or blurred ones, by a trained network."""
