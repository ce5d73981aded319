"""What exists: models, datasets, samples, indexes, jobs. All SQL of the project lives in this package."""
