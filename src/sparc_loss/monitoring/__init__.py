"""What looks at validation pairs between epochs. It never ends a run, and leaves the training unchanged."""
