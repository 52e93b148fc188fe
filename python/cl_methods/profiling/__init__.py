"""The profile of a method's training step over the frozen CLIP, and its figures and page."""
