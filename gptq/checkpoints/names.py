"""Names of formats, for code that must not load torch; `formats.FORMATS` has the formats."""

# What `--format` of a quantization takes. A test holds it and `formats.folder_formats` together.
FOLDER_FORMATS = ("gptq", "gptq_v2", "compressed-tensors", "awq", "mlx")
# Inputs that share a scale in a .gguf file, and so the group size to quantize with for one.
GGUF_GROUP = 32
FILE_ENDINGS = {"save": (".pt", ".gguf"), "save_safetensors": (".safetensors",)}
"""Of the files that a quantization writes, by the argument that names them."""
