"""The systems around the models of a release: data generation, data release, fine-tuning and
comparison, as BELLE has them.

It uses gptq for models and their files, as a user would. Nothing in gptq knows this package.
"""
