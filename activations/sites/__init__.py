"""Sites: hook names, the modules they stand for, and the hooks that read or change them."""

from saescope.moved import names_in

__getattr__ = names_in(__name__, "activations.sites.names")
