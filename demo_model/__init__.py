"""The model in the box, and the demo that shows Baton at work with it."""
