"""How good a model is: zero-shot classification and retrieval, with the same result on any number of processes."""
