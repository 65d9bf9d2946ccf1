"""Names of the formats in `formats.FORMATS`, for code that must not load torch."""

# Formats that keep weights packed. A test holds this and the table together.
PACKED_FORMATS = ("gptq", "gptq_v2")
# A full model in 16 bits.
DENSE = "dense"
