"""Training: losses and steps are pure functions of a state; the loop around them owns files and logs."""
