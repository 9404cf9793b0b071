"""The proof of the promises: injects faults into a real cluster while it trains, and checks the history of the run."""
