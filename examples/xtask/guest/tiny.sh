# Nothing: alive, and that is all.
