"""From a corpus and a model to a harvest: what is planned, computed, kept and committed."""
