"""Data sets as pure functions of (seed, step, rows), and what prepares and feeds them."""
