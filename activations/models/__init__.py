"""Models: language models, text encoders, vision and diffusion models behind one base class."""
