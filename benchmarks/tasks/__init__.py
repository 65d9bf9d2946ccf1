"""Right answers of full and quantized models by lm-eval: `python -m benchmarks.tasks`.

It must not know how a checkpoint was made.
"""
