"""What a run is going to do, counted before it does anything: methods run on tensors that have shapes and no data."""
