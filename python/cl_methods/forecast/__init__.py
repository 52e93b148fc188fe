"""What a run would take on hardware that is not at hand: work counted without data, time and memory predicted from it."""
