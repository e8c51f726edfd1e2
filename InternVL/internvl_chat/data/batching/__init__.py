"""Which records form a step, and how they are packed into rows."""
