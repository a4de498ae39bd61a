"""What both sides must agree on: tensors, programs, state, channels, errors."""
