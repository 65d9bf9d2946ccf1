"""Scripts that run in other toolkits' own environments, on the model and tokens they are given."""
