"""Products and the solver's inner loops in compiled code for CPUs (csrc/cpu)."""
