"""Sites: hook names, the modules they stand for, and the hooks that read or change them."""
