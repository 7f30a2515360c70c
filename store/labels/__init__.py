"""Labels made by machine: from the store alone, or by a language model; each with its score."""
