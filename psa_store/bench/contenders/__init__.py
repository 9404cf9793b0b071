"""Those that take part, a module each: how its processes are started, and what a step is in them."""
