"""From images to a config: a survey, the choice of every setting, the file, and what it will take."""
