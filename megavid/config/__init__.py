"""What a run is: the schema, the presets, and the loader that joins them. Imports no torch."""
