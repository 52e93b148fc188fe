"""Training within a budget of memory: what saves memory, how much a step takes, and the plan that makes both meet."""
