"""The verbs of the command `zoo`, one file each."""
