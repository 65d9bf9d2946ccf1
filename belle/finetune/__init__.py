"""Fine-tuning on instruction and chat records: recipes, encoding, what is trained, the run.

It trains what `gptq.load` returns with transformers' Trainer, and must not know how records were
made or how models are compared.
"""
