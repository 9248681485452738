"""Communication: one small interface (`interface.Group`) and its implementations for every backend."""
