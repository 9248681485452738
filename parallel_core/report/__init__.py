"""Looking at a run before, during and after it: schedules drawn and simulated, memory. Training never needs it."""
