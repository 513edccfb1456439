"""The model zoo, and how any model is split into units and a head."""
