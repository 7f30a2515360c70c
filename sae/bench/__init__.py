"""How fast operations and training steps are on this machine: `saescope bench`."""
