"""RAVEL: whether some features change one attribute of an entity, and leave its others alone."""
