"""Models: language models, text encoders, vision and diffusion models behind one base class."""

from saescope.moved import names_in

__getattr__ = names_in(__name__, "activations.models.language", "activations.models.load")
