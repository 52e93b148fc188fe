"""What methods are made of: detectors, memories, teachers, attention and optimisers, none of which knows a method."""
