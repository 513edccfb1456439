"""What training will take: traced costs, the peak of a stage, memory over time, and the fit to one device."""
