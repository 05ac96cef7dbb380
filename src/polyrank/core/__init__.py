"""The algebra, the types and the round: pure values and functions, no I/O, no models."""
