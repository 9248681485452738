"""Which layout is the fastest that fits: every legal one, priced by one model of time and memory. No device needed."""
