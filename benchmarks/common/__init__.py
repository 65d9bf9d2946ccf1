"""What several benchmarks share: models and texts, measures, a stopwatch."""
